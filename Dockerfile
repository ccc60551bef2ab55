# emf_lightning in a container; docs/how_to/clusters.md shows how to run it.
#   docker build --tag emf .                                                            CPU and GPU: torch brings CUDA
#   docker build --tag emf --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 .      with CUDA's compiler as well
ARG BASE=python:3.12-slim
FROM ${BASE}

# a C compiler for torch.compile; CUDA's images have no Python
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && { command -v python3 || apt-get install --yes --no-install-recommends python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/*

# the packages at the lock's versions and with its hashes, in a layer that a change of the code keeps
ENV PATH=/opt/emf/bin:$PATH
WORKDIR /opt/build
COPY requirements.lock ./
RUN python3 -m venv /opt/emf \
    && sed -n '/^uv==/,/[^\\]$/p' requirements.lock > uv.lock \
    && pip install --no-cache-dir --require-hashes -r uv.lock \
    && uv pip install --python /opt/emf --no-cache --compile-bytecode --require-hashes -r requirements.lock

COPY . ./
RUN uv pip install --python /opt/emf --no-cache --compile-bytecode --no-deps --no-build-isolation .

# any user may run it: runs, data and downloads go into the folder that is mounted at /workspace
ENV HOME=/tmp USER=emf HF_HOME=/workspace/.cache/huggingface
WORKDIR /workspace
ENTRYPOINT ["emf"]
CMD ["--help"]
