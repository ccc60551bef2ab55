"""Files of published weights, in a folder or on the hub."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emf_lightning.files import read_json
from emf_lightning.pretrained.configs import CONFIGS

if TYPE_CHECKING:
    from torch import Tensor

_REMEDY = "download it again"


def config_of(name: str, subfolder: str | None = None) -> dict[str, Any]:
    """The ``config.json`` of a folder or hub name, else its entry in ``CONFIGS``.

    Raises:
        OSError: if there is neither.
        ValueError: for a file that is no JSON object.
    """
    try:
        file = _file(name, "config.json", subfolder)
    except OSError:
        known = CONFIGS.get("/".join(filter(None, (name, subfolder))))
        if known is None:
            raise
        return dict(known)
    return read_json(file, _REMEDY)


def tensors_of(
    name: str,
    prefix: str,
    wanted: Container[str] | None = None,
    *,
    subfolder: str | None = None,
    stem: str = "model",
) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it, from a folder's or hub name's safetensors.

    Only the files that hold one of them are read, or downloaded. ``wanted`` are names without ``prefix``, by default
    all. ``stem`` begins the files' names: diffusers' is ``diffusion_pytorch_model``. Raises ``OSError`` if there are no
    safetensors, ``ValueError`` if a file is damaged.
    """
    opened = ((key.removeprefix(prefix), key, file) for key, file in _opened(name, prefix, subfolder, stem))
    return {short: file.get_tensor(key) for short, key, file in opened if wanted is None or short in wanted}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in a folder's or hub name's safetensors, by name; raises as ``tensors_of``."""
    return {key: tuple(file.get_slice(key).get_shape()) for key, file in _opened(name, "")}


def _opened(name: str, prefix: str, subfolder: str | None = None, stem: str = "model") -> Iterator[tuple[str, Any]]:
    """The full names that begin with ``prefix``, each with its open file."""
    from safetensors import SafetensorError, safe_open

    for path in _weight_files(name, prefix, subfolder, stem):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # no mapping
                    if key.startswith(prefix):
                        yield key, file
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}): download it again") from error


def _weight_files(name: str, prefix: str, subfolder: str | None, stem: str) -> Iterator[Path]:
    try:
        index = _file(name, f"{stem}.safetensors.index.json", subfolder)
    except OSError:
        yield _file(name, f"{stem}.safetensors", subfolder)
        return
    files = read_json(index, _REMEDY).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index}: its weight_map names no files; {_REMEDY}")
    for file in sorted({file for key, file in files.items() if key.startswith(prefix)}):
        yield _file(name, file, subfolder)


def _file(name: str, file: str, subfolder: str | None = None) -> Path:
    """Path of a file in a folder, or in the cache of a hub repository, downloaded if need be; OSError if it fails."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        path = folder / (subfolder or "") / file
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(name, file, subfolder=subfolder))
    except HFValidationError as error:  # a path that does not exist
        raise FileNotFoundError(f"no folder {name}") from error
