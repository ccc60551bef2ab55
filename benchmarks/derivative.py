"""Measures what MeanFlow's derivative costs and how exact it is, by kind, beside two published ways to take it.

Writes docs/results/derivative.md; `python -m benchmarks.derivative --help` names the options.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import attention
from benchmarks.operations import count_operations, peak_bytes
from emf_lightning.flow.derivative.attention import WHOLE_LOGITS
from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.derivative.finite_difference import FiniteDifference
from emf_lightning.flow.derivative.float64 import KeepFloat64
from emf_lightning.flow.derivative.forward_mode import ForwardMode, Fused
from emf_lightning.flow.objectives.base import weighted_mse
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.path import expand_like
from emf_lightning.flow.times import Times
from emf_lightning.flow.velocity import AverageVelocity, Velocity
from emf_lightning.flow.weighting import AdaptiveWeighting
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.text.base import TextFeatures

SHARES = (0.25, 0.5, 0.75)
FLOW, RECORDED, SEPARATE = "flow matching", "full batch, recorded", "full batch, no graph"


@dataclass(frozen=True)
class Size:
    """A network and a batch of data for it.

    Attributes:
        name: heading.
        architecture: of the network.
        channels: of the latents.
        side: of the latents.
        rows: of a batch.
        tokens: of a caption.
    """

    name: str
    architecture: SanaArchitecture
    channels: int
    side: int
    rows: int
    tokens: int


SIZES = {
    "tiny": Size("width 192, 6 blocks, 9 tokens (the shapes network)", SanaArchitecture(), 3, 36, 64, 10),
    "wide": Size(
        "width 1024, 1 block, 256 tokens",
        SanaArchitecture(
            num_layers=1,
            num_attention_heads=32,
            num_cross_attention_heads=16,
            cross_attention_head_dim=64,
            patch_size=1,
            interpolation_scale=None,
            qk_norm="rms_norm_across_heads",
        ),
        channels=32,
        side=16,
        rows=4,
        tokens=32,
    ),
}


@dataclass
class Measured:
    """What one way of taking a step costs.

    Attributes:
        operations: floating-point operations.
        bytes: allocated at the peak.
        seconds: of each round.
    """

    operations: int = 0
    bytes: int = 0
    seconds: list[float] = field(default_factory=list)


class Bench:
    """A network, a batch, and steps on them.

    Args:
        size: of both.
        device: where.
        precision: fp32, or bf16 for autocast.
    """

    def __init__(self, size: Size, device: torch.device, precision: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.bf16 = precision == "bf16"
        self.rows = size.rows
        self.net = SanaFlowMap(
            size.architecture,
            time_scale=1.0,
            attention_backend="math" if size.tokens < 16 and device.type == "cpu" else None,
            latent_channels=size.channels,
            latent_size=size.side,
        ).to(device)
        generator = torch.Generator().manual_seed(1)
        shape = (size.rows, size.channels, size.side, size.side)
        self.z, self.v = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        self.t = (0.2 + 0.7 * torch.rand(size.rows, generator=generator)).to(device)
        context = torch.randn(size.rows, size.tokens, 128, generator=generator).to(device)
        self.text = TextFeatures(context, torch.ones(size.rows, size.tokens, dtype=torch.bool, device=device))
        self.half = copy.deepcopy(self.net).bfloat16()  # what a trainer of bf16 weights holds

    def steps(self) -> dict[str, Callable[[], None]]:
        """Name -> one forward and backward pass."""
        steps: dict[str, Callable[[], None]] = {FLOW: lambda: self._flow()}
        kinds: dict[str, Callable[[], Derivative]] = {
            "ForwardMode": ForwardMode,
            "ForwardMode(fast=False)": lambda: ForwardMode(fast=False),
            "Fused": Fused,
            "FiniteDifference": FiniteDifference,
        }
        for name, kind in kinds.items():
            for share in SHARES:
                steps[f"{name} {share}"] = lambda kind=kind, share=share: self._meanflow(kind(), share)  # type: ignore[misc]
        steps[RECORDED] = self._recorded
        steps[SEPARATE] = self._separate
        return steps

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def velocity(self, net: SanaFlowMap | None = None) -> AverageVelocity:
        """u of ``net``, or of this network, given the batch's captions."""
        return AverageVelocity(net or self.net, (self.text.context, self.text.mask))

    def _times(self, share: float) -> Times:
        n = round(share * self.rows)
        return Times(torch.cat([self.t[:n] * 0.4, self.t[n:]]), self.t, n)

    def _flow(self) -> None:
        with self._autocast():
            times = Times(self.t, self.t, 0)
            terms = FlowMatching().terms(self.velocity(), self.z, self.v, times, AdaptiveWeighting())
        torch.autograd.backward(terms.loss)

    def _meanflow(self, derivative: Derivative, share: float) -> None:
        with self._autocast():
            objective, times = MeanFlow(derivative=derivative), self._times(share)
            terms = objective.terms(self.velocity(), self.z, self.v, times, AdaptiveWeighting(), 0.0)
        torch.autograd.backward(terms.loss)

    def _jvp(self, net: SanaFlowMap, times: Times) -> Tensor:
        u = self.velocity(net)
        tangents = (self.v, torch.zeros_like(times.r), torch.ones_like(times.t))
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(u, (self.z, times.r, times.t), tangents)[1]

    def _recorded(self) -> None:
        """The whole network to fp32, du/dt of every row with gradients on, the network back, then u.

        In fp32 there is nothing to cast.
        """
        times, net = self._times(0.5), self.half if self.bf16 else self.net
        if self.bf16:
            net.float()
        dudt = self._jvp(net, times)
        if self.bf16:
            net.bfloat16()
        self._regress(net, times, dudt)

    def _separate(self) -> None:
        """du/dt of every row without gradients, then u."""
        times = self._times(0.5)
        with torch.no_grad(), self._autocast():
            dudt = self._jvp(self.net, times)
        torch.clear_autocast_cache()
        with self._autocast():
            self._regress(self.net, times, dudt)

    def _regress(self, net: SanaFlowMap, times: Times, dudt: Tensor) -> None:
        target = (self.v - expand_like(times.t - times.r, self.z) * dudt).detach()
        value = self.velocity(net)(self.z, times.r, times.t)
        terms = weighted_mse(value, target, self.v, times, AdaptiveWeighting(), dudt.detach())
        torch.autograd.backward(terms.loss)

    def clear(self) -> None:
        """Drops the gradients, for the next step to start from the same memory."""
        self.net.zero_grad(set_to_none=True)
        self.half.zero_grad(set_to_none=True)


def seconds(bench: Bench, step: Callable[[], None], timer: Callable[[], float]) -> float:
    def wait() -> None:
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)

    bench.clear()
    wait()
    began = timer()
    step()
    wait()
    return timer() - began


def measure(bench: Bench, rounds: int, timer: Callable[[], float]) -> dict[str, Measured]:
    """Every step's cost; the steps take turns in each round, so that a busy machine slows all alike."""
    steps = bench.steps()
    measured = {name: Measured() for name in steps}
    for name, step in steps.items():
        step()  # what is set up once
        bench.clear()
        measured[name].operations = count_operations(step)
        bench.clear()
        measured[name].bytes = peak_bytes(step, bench.device)
    for _ in range(rounds):
        for name, step in steps.items():
            measured[name].seconds.append(seconds(bench, step, timer))
    return measured


# -- exactness --------------------------------------------------------------------------------------------------------


def exactness(device: torch.device) -> list[list[str]]:
    """Relative errors of du/dt against float64, by kind and precision, for times as they are and x 1000."""
    rows: dict[str, list[str]] = {}
    for scale in (1.0, 1000.0):
        bench = Bench(_exactness_size(), device, "fp32")
        net = bench.net
        net.time_scale = scale
        torch.nn.init.normal_(net.transformer.time_embed.interval.linear.weight, std=0.05)
        z, v, t = bench.z, bench.v, bench.t
        r = 0.4 * t
        double = copy.deepcopy(net).double()
        u64 = AverageVelocity(double, (bench.text.context.double(), bench.text.mask))
        with KeepFloat64():
            exact = ForwardMode().jvp(u64, z.double(), r.double(), t.double(), v.double())
        full, coarse = bench.velocity(), bench.velocity(copy.deepcopy(net).bfloat16())

        def rounded(z: Tensor, r: Tensor, t: Tensor, coarse: Velocity = coarse, scale: float = scale) -> Tensor:
            return coarse(z, *((time * scale).bfloat16().float() / scale for time in (r, t)))

        for name, derivative, u in (
            ("ForwardMode, fp32", ForwardMode("fp32"), full),
            ("ForwardMode(fast=False), fp32", ForwardMode("fp32", fast=False), full),
            ("ForwardMode, bf16 autocast", ForwardMode("bf16"), full),
            ("ForwardMode, bf16 weights", ForwardMode(), coarse),
            ("ForwardMode, bf16 weights, times rounded to bf16", ForwardMode(), rounded),
            *(
                (f"FiniteDifference, h = {h:g}, {'central' if central else 'one-sided'}, fp32", kind, full)
                for central in (True, False)
                for h in (5e-3, 1e-3, 3e-5)
                for kind in (FiniteDifference(h, central=central),)
            ),
        ):
            dudt = derivative.jvp(u, z, r, t, v).double()
            error = float((dudt - exact).norm() / exact.norm())
            rows.setdefault(name, []).append(f"{error:.1e}")
    return [[name, *errors] for name, errors in rows.items()]


def _exactness_size() -> Size:
    architecture = SanaArchitecture(
        num_layers=4,
        num_attention_heads=8,
        num_cross_attention_heads=4,
        patch_size=1,
        qk_norm="rms_norm_across_heads",
    )
    return Size("width 256, 4 blocks, 256 tokens", architecture, 8, 16, 4, 32)


# -- what it says -----------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def least(share: float) -> float:
    """Of operations, in flow-matching steps: three passes, and u and du/dt of a share of the rows."""
    return (3 + 2 * share) / 3


def ratios(measured: dict[str, Measured], name: str) -> tuple[float, float, float, float]:
    """Operations, median time, its spread (half the interquartile range) and peak, in flow-matching steps."""
    one, flow = measured[name], measured[FLOW]
    times = [a / b for a, b in zip(one.seconds, flow.seconds, strict=True)]
    low, _, high = statistics.quantiles(times, n=4)
    return one.operations / flow.operations, statistics.median(times), (high - low) / 2, one.bytes / flow.bytes


def section(size: Size, precision: str, measured: dict[str, Measured]) -> list[str]:
    flow, rows = measured[FLOW], []
    time = 1e3 * statistics.median(flow.seconds)
    for name in measured:
        operations, median, spread, peak = ratios(measured, name)
        kind, _, share = name.rpartition(" ")
        at = [kind, share, f"{least(float(share)):.3f}"] if share in map(str, SHARES) else [name, "any", ""]
        rows.append([*at, f"{operations:.3f}", f"{median:.2f} ± {spread:.2f}", f"{peak:.2f}"])
    rows[0][1] = "-"
    return [
        f"## {size.name}, batch {size.rows}, {precision}",
        "",
        f"A flow-matching step: {flow.operations / 1e9:.2f} GFLOP, {time:.0f} ms, {flow.bytes / 2**20:.0f} MiB.",
        "",
        *table(["step", "share of r < t", "least", "operations", "time", "peak"], rows),
        "",
    ]


def bounds(name: str, precision: str, measured: dict[str, Measured]) -> list[list[str]]:
    """ForwardMode's operations and time ratios the least, and its peak ratios flow matching's, a row for each share."""
    rows = []
    for share in SHARES:
        operations, median, _, peak = ratios(measured, f"ForwardMode {share}")
        relative = [operations / least(share), median / least(share), peak]
        rows.append([f"{name}, {precision}", str(share), *(f"{value:.3f}" for value in relative)])
    return rows


def attention_section(device: torch.device, timer: Callable[[], float]) -> list[str]:
    """The rules of attention side by side."""
    return [
        "## Attention",
        "",
        f"{attention.HEADS} heads of width {attention.WIDTH}, q, k and v move. Operations and time are relative to",
        "torch's kernel of a forward pass. Value and tangent take three times its operations, not two: by the product",
        "rule, each of two products of moving factors has two tangents.",
        "",
        *table(attention.HEAD, attention.measure(device, timer)),
        "",
        f"ForwardMode holds all weights up to 2^{WHOLE_LOGITS.bit_length() - 1} logits (samples x heads x queries x",
        "keys) and takes blocks above that: their memory is linear in length. Blocks of bf16 are multiplied in fp32.",
        "",
    ]


def released(name: str, precision: str, measured: dict[str, Measured]) -> list[str]:
    """Of the release's step over ForwardMode's at a share of .25: operations, time, its bound and the peak."""
    our_operations, ours, _, our_peak = ratios(measured, "ForwardMode 0.25")
    their_operations, theirs, _, their_peak = ratios(measured, RECORDED)
    relative = their_operations / our_operations, theirs / ours, theirs / least(0.25), their_peak / our_peak
    return [f"{name}, {precision}", *(f"{value:.2f}" for value in relative)]


PARTS_HEAD = [
    "network",
    "u, a quarter of the rows / all",
    "du/dt / u, a quarter",
    "du/dt / u, all",
    "du/dt, a quarter",
]


def parts(name: str, bench: Bench, rounds: int, timer: Callable[[], float]) -> list[str]:
    """How u and du/dt without gradients grow with the rows: medians of rounds, and the quarter's du/dt in ms."""

    def u_and_dudt(rows: int) -> tuple[Callable[[], None], Callable[[], None]]:
        u = AverageVelocity(bench.net, (bench.text.context[:rows], bench.text.mask[:rows]))
        z, t, v = bench.z[:rows], bench.t[:rows], bench.v[:rows]

        def value() -> None:
            with bench._autocast(), torch.no_grad():
                u(z, 0.4 * t, t)

        def derivative() -> None:
            with bench._autocast():
                ForwardMode().jvp(u, z, 0.4 * t, t, v)

        return value, derivative

    steps = [*u_and_dudt(bench.rows // 4), *u_and_dudt(bench.rows)]
    times: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for taken, step in zip(times, steps, strict=True):
            time_taken = seconds(bench, step, timer)
            if number:  # the first round sets up
                taken.append(time_taken)
    quarter, quarter_dudt, whole, whole_dudt = (statistics.median(taken) for taken in times)
    relative = quarter / whole, quarter_dudt / quarter, whole_dudt / whole
    return [name, *(f"{value:.2f}" for value in relative), f"{1e3 * quarter_dudt:.0f} ms"]


MEANINGS = (
    (
        RECORDED,
        "EMF's release: casts the network to fp32 and back (bf16 tables only); du/dt of all samples records a graph",
    ),
    (SEPARATE, "the same without graph and casts; neither step depends on the share of samples with r < t"),
    ("ForwardMode(fast=False)", "`torch.func.jvp` for the samples with r < t"),
    ("FiniteDifference", "its passes always run in fp32"),
)
"""Steps of the tables whose names do not say all, and their explanations."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=sorted(SIZES))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9, help="of all steps in turn; at least 2")
    parser.add_argument("--out", type=Path, help="default: docs/results/derivative.md, derivative_cuda.md on CUDA")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    timer = time.process_time if device.type == "cpu" else time.perf_counter
    place = "one thread of a CPU, process time" if device.type == "cpu" else torch.cuda.get_device_name()
    results = Path(__file__).parents[1] / "docs" / "results"
    out = options.out or results / f"derivative{'_cuda' * (device.type == 'cuda')}.md"

    sections, bound_rows, released_rows, part_rows, loads = [], [], [], [], [os.getloadavg()[0]]
    for name in options.sizes:
        for precision in options.precisions:
            bench = Bench(SIZES[name], device, precision)
            measured = measure(bench, options.rounds, timer)
            part_rows.append(parts(f"{name}, {precision}", bench, options.rounds, timer))
            loads.append(os.getloadavg()[0])
            sections += section(SIZES[name], precision, measured)
            bound_rows += bounds(name, precision, measured)
            released_rows.append(released(name, precision, measured))
            print("\n".join(section(SIZES[name], precision, measured)), flush=True)
    load = statistics.mean(loads)
    lines = [
        "# Derivative: cost and accuracy",
        "",
        f"`benchmarks/derivative.py` (`make bench`) writes this page: {place}, torch {torch.__version__}. A step",
        "is one forward and one backward pass without the optimizer. All figures are relative to a flow-matching step",
        "on the same network and batch.",
        "",
        f"- *{RECORDED}*: as EMF's release does it, the network goes to fp32 and back (in the bf16 tables; in fp32",
        "  there is nothing to cast), and all rows' du/dt records a graph that nobody uses.",
        f"- *{SEPARATE}*: without graph and casts. Both do the same whatever the share of r < t rows is.",
        "- *ForwardMode(fast=False)*: torch's own forward mode, for the r < t rows.",
        "- *FiniteDifference* takes its passes in fp32 always.",
        "- *operations* counts matrix products, convolutions and attention; *peak* is the allocator's peak above its",
        "  level before the step. Both are the same in every run.",
        "- *least* is the lower bound on operations: three passes, plus u and du/dt of the samples with r < t,",
        "  (3 + 2 share) / 3.",
        f"- *time* is the median of {options.rounds} rounds in which all steps take turns, ± half the interquartile",
        f"  range. The load average was {load:.1f} on {os.cpu_count()} cores, this process included.",
        "",
        *table(["step", "meaning"], MEANINGS),
        "",
        *sections,
        "## Accuracy",
        "",
        f"Relative error of du/dt against float64 ({_exactness_size().name}, random weights).",
        "",
        *table(["kind", "times in [0, 1]", "times x 1000"], exactness(device)),
        "",
        *attention_section(device, timer),
        "## ForwardMode against its lower bound",
        "",
        *table(
            ["network", "share of r < t", "operations / least", "time / least", "peak / flow matching's"], bound_rows
        ),
        "",
        "The recorded full batch of EMF's release, relative to ForwardMode at a share of 0.25:",
        "",
        *table(["network", "operations", "time", "time, ForwardMode at its least", "peak"], released_rows),
        "",
        "The last but one is the bound: by a ForwardMode whose time is (3 + 2 * 0.25) / 3 of flow matching's, as its",
        "operations are. Above the ratio of operations lies what the release records and casts.",
        "",
        "What ForwardMode takes above its least is mostly a cost of each call, whatever the number of rows: the start",
        "of about a thousand operators, and in bf16 the casts of the weights. By operations a quarter of the rows",
        "takes 0.25 of all rows' pass, and du/dt twice u's:",
        "",
        *table(PARTS_HEAD, part_rows),
        "",
        "*tiny* is the network of width 192, *wide* the one of width 1024.",
    ]
    out.write_text("\n".join(lines) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
