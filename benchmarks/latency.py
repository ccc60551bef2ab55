"""Measures sampling at full size by its parts: network steps and decoding; and a training step with the derivative.

Writes docs/results/latency.md; `python -m benchmarks.latency --help` names the options. Weights are random: time and
memory do not depend on them. `benchmarks.token_sampling` measures the generation of BLIP3o-NEXT's image tokens, which
takes most of an image's time there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from emf_lightning.flow.guidance import guided
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.sampling import FlowMapSampler
from emf_lightning.flow.times import Times
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.flow.weighting import AdaptiveWeighting
from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.pretrained.files import CONFIGS
from emf_lightning.text.base import TextFeatures

STEPS = (1, 2, 4, 30)
PAPER = {1: 0.08, 2: 0.12, 4: 0.22, 30: 1.24}
"""Seconds on an H200 in arXiv 2604.18168, for the diffusion part; guidance and batch are not stated."""

SANA = "Efficient-Large-Model/SANA1.5_{}_1024px_diffusers/transformer"
TRAINED = ("transformer_blocks", "time_embed", "scale_shift_table")


@dataclass(frozen=True)
class Workload:
    """A network and the size of its inputs.

    Attributes:
        architecture: of the network.
        side: of its latents, which have 32 channels.
        tokens: of the text.
        width: of the text features.
    """

    architecture: SanaArchitecture
    side: int
    tokens: int
    width: int


def _published(size: str) -> SanaArchitecture:
    config = CONFIGS[SANA.format(size)]
    names = SanaArchitecture.__dataclass_fields__
    return SanaArchitecture(**{name: value for name, value in config.items() if name in names})


WORKLOADS = {
    "1.6B": Workload(_published("1.6B"), 32, 730, 2304),
    "4.8B": Workload(_published("4.8B"), 32, 730, 2304),
    "small": Workload(SanaArchitecture(patch_size=1), 8, 30, 64),
}


class Latency:
    """Times of one network on one device.

    Args:
        workload: the network to build and the size of its inputs.
        device: where.
        dtype: of the weights when sampling.
        batch: images at once.
        compiled: whether blocks are compiled.
        repeats: of each measurement, after one to warm up.
    """

    def __init__(
        self, workload: Workload, device: torch.device, dtype: torch.dtype, batch: int, compiled: bool, repeats: int
    ) -> None:
        self.workload, self.device, self.batch, self.repeats = workload, device, batch, repeats
        with device:
            self.net = SanaFlowMap(
                workload.architecture,
                time_scale=1,
                finetuning=Finetuning(trainable=list(TRAINED)),
                compile=compiled,
                latent_channels=32,
                latent_size=workload.side,
                context_width=workload.width,
            )
            self.context = torch.randn(batch, workload.tokens, workload.width)
            self.noise = torch.randn(batch, 32, workload.side, workload.side)
        self.net.eval().to(dtype)
        self.text = TextFeatures(self.context, torch.ones(batch, workload.tokens, dtype=torch.bool, device=device))

    def seconds(self, run: Callable[[], object]) -> float:
        """The median time of ``run``."""
        times = []
        for _ in range(self.repeats + 1):
            self._wait()
            began = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def sampling(self, steps: int, guidance: bool) -> float:
        """Seconds of ``steps`` network steps, with or without guidance."""
        u = AverageVelocity(self.net, (self.text.context, self.text.mask))
        velocity = guided(u, AverageVelocity(self.net, (self.text.context, self.text.mask)), 2.0) if guidance else u
        return self.seconds(lambda: FlowMapSampler()(velocity, self.noise, steps))

    @torch.no_grad()
    def decoding(self, dtype: torch.dtype) -> float:
        """Seconds of f32c32's decoder."""
        from diffusers import AutoencoderDC

        with self.device:
            model = AutoencoderDC.from_config(CONFIGS["mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"])
        model = torch.nn.Module.to(model, dtype=dtype).eval()
        return self.seconds(lambda: model.decode(self.noise.to(dtype), return_dict=False))

    def training(self, rows: int, share: float, checkpointing: bool) -> tuple[float, float]:
        """Seconds and, on a GPU, GB of a MeanFlow step of ``rows`` rows in bf16, AdamW included, weights in fp32."""
        self.net.train().float()
        if checkpointing:
            self.net.transformer.enable_gradient_checkpointing()
        adam = torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=1e-5)
        workload, n = self.workload, round(share * rows)
        with self.device:
            z, v = (torch.randn(rows, 32, workload.side, workload.side) for _ in range(2))
            t = torch.linspace(0.1, 0.9, rows)
            text = TextFeatures(
                torch.randn(rows, workload.tokens, workload.width), torch.ones(rows, workload.tokens, dtype=torch.bool)
            )
        times = Times(torch.cat([0.5 * t[:n], t[n:]]), t, n)
        objective, weighting = MeanFlow(), AdaptiveWeighting()

        def step() -> None:
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = objective.terms(
                    AverageVelocity(self.net, (text.context, text.mask)), z, v, times, weighting, 0.0
                ).loss
            loss.backward()
            adam.step()
            adam.zero_grad()

        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.seconds(step)
        return seconds, torch.cuda.max_memory_allocated(self.device) / 1e9 if cuda else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=WORKLOADS, default="1.6B" if cuda else "small")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the network's blocks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="of a training step")
    parser.add_argument("--checkpointing", action="store_true", help="in training")
    parser.add_argument("--skip", nargs="*", choices=("decoding", "training"), default=[])
    parser.add_argument("--out", type=Path, default=Path("docs/results/latency.md"))
    options = parser.parse_args()

    device, dtype = torch.device(options.device), torch.bfloat16
    latency = Latency(WORKLOADS[options.size], device, dtype, options.batch, options.compile, options.repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    compared = options.size == "1.6B"
    compiled, tokens = ", blocks compiled" if options.compile else "", WORKLOADS[options.size].tokens
    conditions = (
        f"SANA {options.size} with random weights on {name}, bf16, batch {options.batch}{compiled}, {tokens} text "
        f"tokens, torch {torch.__version__}; medians of {options.repeats}. Written by `python -m benchmarks.latency`."
    )
    lines = [
        "# Latency",
        "",
        conditions,
        "",
        "| network steps | seconds | with guidance |" + " the paper, H200 |" * compared,
        "|---|---|---|" + "---|" * compared,
    ]
    for steps in STEPS:
        plain, told = (latency.sampling(steps, guidance) for guidance in (False, True))
        lines.append(f"| {steps} | {plain:.3f} | {told:.3f} |" + f" {PAPER[steps]:.2f} |" * compared)
    if "decoding" not in options.skip:
        lines += ["", f"Decoding (DC-AE f32c32): {latency.decoding(dtype):.3f} s."]
    if "training" not in options.skip:
        kind = "checkpointed" if options.checkpointing else "no checkpointing"
        lines += [
            "",
            f"Training, {options.rows} rows, {kind}, weights fp32 under bf16 autocast, AdamW:",
            "",
            "| rows with r < t | seconds a step | peak GB |",
            "|---|---|---|",
        ]
        for share in (0.0, 0.25, 0.5, 0.75):
            seconds, memory = latency.training(options.rows, share, options.checkpointing)
            lines.append(f"| {share:.0%} | {seconds:.3f} | {f'{memory:.1f}' if memory else 'not counted'} |")
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
