"""Measures the errors of du/dt that SelfCheck judges: of healthy starts of the demo, and of planted faults.

Writes docs/results/self_check.md. `--run` names a finished `make demo`, whose last checkpoint is the second network;
`python -m benchmarks.self_check --help` names the other options.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emf_lightning.callbacks.derivative_check import (
    FLOAT64_TOLERANCE,
    SAMPLES,
    Point,
    R,
    T,
    derivative_in_float64,
    derivative_in_training,
    errors,
    points_of,
)
from emf_lightning.callbacks.self_check import SelfCheck
from emf_lightning.cli.parsing.builder import BuildingCLI
from emf_lightning.cli.parsing.experiment_files import expand
from emf_lightning.flow.derivative.float64 import KeepFloat64, central_difference
from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.modules.flow_map import FlowMapModule

EXPERIMENT = "experiments/shapes/demo.yaml"
TOLERANCE = SelfCheck().tolerance
HEALTHY = {
    "forward mode against differences, float64": FLOAT64_TOLERANCE,
    "the training's derivative against it, float64": FLOAT64_TOLERANCE,
    "as training takes it (bf16-mixed) against float64": TOLERANCE,
}
INTRODUCTION = f"""\
`python -m benchmarks.self_check`, {{starts}} starts of `{EXPERIMENT}` that differ in the data's seed, each with
{SAMPLES} samples of its first batch: {{samples:,}} samples. Relative errors |error| / |du/dt|: over all samples
(50 %, 99 %, largest), and the medians of the starts' {SAMPLES} samples, by which `SelfCheck` judges. du/dt nearly
cancels at some samples and has sharp bends at others, where bf16 leaves errors above 1: the errors have a long tail,
their medians have none."""

Measured = dict[str, list[Tensor]]
"""Name -> each start's errors, ``[16]``."""


def build(run: Path | None) -> tuple[FlowMapModule, Any]:
    """The demo's module at its start, or with the live weights of ``run``'s last checkpoint, and its data."""
    torch.manual_seed(0)
    built = BuildingCLI.run(["fit", *expand(["--config", EXPERIMENT])])
    if run is not None:
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
        built.model.load_state_dict(checkpoint["current_model_state"])  # SelfCheck looks at these, not at the averages
    built.datamodule.num_workers = 0
    return built.model.eval(), built.datamodule


def first_batch(data: Any, seed: int) -> Any:
    data.seed = seed
    data.setup("fit")
    return data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)


# -- faults: forward hooks on parts of the network, and derivatives that return something else -----------------------


def _detach(module: nn.Module, inputs: Any, output: Any) -> Any:
    return tuple(part.detach() for part in output) if isinstance(output, tuple) else output.detach()


def _detach_branch(module: nn.Module, inputs: Any, output: Any) -> Any:
    return inputs[0] + (output - inputs[0]).detach()


def _rounded(time: Tensor) -> Tensor:
    return time.bfloat16().to(time.dtype)


@contextmanager
def lost(parts: list[nn.Module], hook: Callable[..., Any] = _detach) -> Iterator[None]:
    handles = [part.register_forward_hook(hook) for part in parts]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def rounded_length(net: Any) -> Iterator[None]:
    interval = net.transformer.time_embed.interval
    handle = interval.register_forward_pre_hook(lambda module, inputs: (_rounded(inputs[0]), *inputs[1:]))
    yield
    handle.remove()


def _blocks(net: Any) -> Any:
    return net.transformer.transformer_blocks


NETWORK_FAULTS: dict[str, Callable[[Any], Any]] = {
    "no tangent through the text branches": lambda net: lost([block.attn2 for block in _blocks(net)]),
    "no tangent through block 3 of 6": lambda net: lost([_blocks(net)[2]], _detach_branch),
    "no tangent through block 3's self-attention": lambda net: lost([_blocks(net)[2].attn1]),
    "no tangent through block 3's text branch": lambda net: lost([_blocks(net)[2].attn2]),
    "no tangent through the interval's embedding": lambda net: lost([net.transformer.time_embed.interval]),
    "no tangent through the time embedding": lambda net: lost([net.transformer.time_embed.emb]),
    "t - r rounded to bf16": rounded_length,
}


def method_faults(u: AverageVelocity, other: nn.Module, point: Point) -> dict[str, Callable[[], Tensor]]:
    """Name -> du/dt by a faulty derivative."""
    z, v, (r, t) = point.z, point.v, point.times(R, T)
    jvp = ForwardMode().jvp

    def without_block() -> Tensor:
        with lost([_blocks(u.net)[2]], _detach_branch):
            return jvp(u, z, r, t, v)

    return {
        "wrong sign": lambda: -jvp(u, z, r, t, v),
        "half of it": lambda: jvp(u, z, r, t, v) / 2,
        "along -v": lambda: jvp(u, z, r, t, -v),
        "no tangent of z": lambda: jvp(u, z, r, t, 0 * v),
        "r moves, too: t - r constant": lambda: torch.func.jvp(u, (z, r, t), (v, r / r, t / t))[1],
        "another network's (weights 10 % off)": lambda: jvp(AverageVelocity(other, u.context), z, r, t, v),
        "no tangent through block 3 of 6 ": without_block,
        "times rounded to bf16": lambda: jvp(u, z, _rounded(r), _rounded(t), v),
    }


def disturbed(net: nn.Module) -> nn.Module:
    other, generator = copy.deepcopy(net), torch.Generator().manual_seed(1)
    for weight in other.parameters():
        if weight.numel() > 1:
            weight.data += 0.1 * weight.data.std() * torch.randn(weight.shape, generator=generator).to(weight)
    return other


# -- measurement ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(run: Path | None, starts: tuple[range, range]) -> Measured:
    """Errors of the healthy starts with the first data seeds; those that are among the second have faults, too."""
    seeds, with_faults = starts
    torch.set_num_threads(1)
    module, data = build(run)
    net, other = copy.deepcopy(module.net).double(), disturbed(module.net)
    other64, measured = copy.deepcopy(other).double(), {}

    def add(name: str, value: Tensor) -> None:
        measured.setdefault(name, []).append(value)

    for seed in seeds:
        points = points_of(first_batch(data, seed))
        assert len(points) == 1, "one batch of all samples"
        point, double = points[0], points[0].double()
        exact = derivative_in_float64(module, points)
        assert exact.method is not None
        names = iter(HEALTHY)
        add(next(names), exact.network)
        add(next(names), exact.method)
        with torch.autocast("cpu", torch.bfloat16):
            add(next(names), errors(derivative_in_training(module, points)[0], exact.values[0]))
        print(f"{'demo' if run is None else run}: data seed {seed}", flush=True)
        if seed not in with_faults:
            continue
        u64 = module.average_velocity(double.text, net)
        at = double.z, *double.times(R, T), double.v
        with KeepFloat64():
            healthy = central_difference(u64, *at, 1e-6)
            for name, fault in NETWORK_FAULTS.items():
                with fault(net):
                    differences = central_difference(u64, *at, 1e-6) if fault is rounded_length else healthy
                    add(name, errors(ForwardMode().jvp(u64, *at), differences))
            for name, dudt in method_faults(u64, other64, double).items():
                add(name, errors(dudt(), exact.values[0]))
        with torch.autocast("cpu", torch.bfloat16):
            for name, dudt in method_faults(module.average_velocity(point.text), other, point).items():
                torch.clear_autocast_cache()
                add(f"{name}|bf16", errors(dudt(), exact.values[0]))
    return measured


def gather(run: Path | None, starts: int, faults: int, jobs: int) -> Measured:
    """``measure`` of data seeds 0, 1, ..., in several processes."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = list(
            pool.map(partial(measure, run), [(range(job, starts, jobs), range(faults)) for job in range(jobs)])
        )
    return {name: [errors for part in parts for errors in part[name]] for name in parts[0]}


# -- what it says -----------------------------------------------------------------------------------------------------


def row(name: str, starts: list[Tensor], bound: float) -> str:
    all_errors = torch.cat(starts)
    medians = torch.stack(starts).median(1).values
    quantiles = [torch.quantile(all_errors, share).item() for share in (0.5, 0.99, 1.0)]
    figures = [*quantiles, medians.min().item(), medians.max().item()]
    refused = f"{int((medians > bound).sum())} of {len(starts)}"
    return f"| {' | '.join([name.strip(), *(f'{figure:.1e}' for figure in figures), f'{bound:g}', refused])} |"


def section(title: str, measured: Measured) -> list[str]:
    def head(first: str) -> list[str]:
        return [f"| {first} | 50 % | 99 % | largest | smallest median | largest | bound | refused |", "|---" * 8 + "|"]

    alone = torch.cat(measured[list(HEALTHY)[-1]]) > TOLERANCE
    methods = [name.removesuffix("|bf16") for name in measured if name.endswith("|bf16")]
    return [
        f"## {title}",
        "",
        *head("healthy"),
        *(row(name, measured[name], bound) for name, bound in HEALTHY.items()),
        "",
        f"Judged alone, {int(alone.sum())} of {len(alone)} healthy samples in bf16 are beyond {TOLERANCE}.",
        "",
        *head("fault in the network, float64"),
        *(row(name, measured[name], FLOAT64_TOLERANCE) for name in NETWORK_FAULTS),
        "",
        *head("fault of the derivative, float64"),
        *(row(name, measured[name], FLOAT64_TOLERANCE) for name in methods),
        "",
        *head("the same in bf16, the bound for faults that float64 does not show"),
        *(row(name, measured[f"{name}|bf16"], TOLERANCE) for name in methods),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="default: the newest of runs/shapes/demo, if there is one")
    parser.add_argument("--starts", type=int, default=100, help="data seeds, at 16 samples each")
    parser.add_argument("--faults", type=int, default=50, help="of the starts that also run with each fault")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/self_check.md"))
    options = parser.parse_args()
    runs = sorted(Path("runs/shapes/demo").glob("version_*"), key=os.path.getmtime)
    run = options.run or (runs[-1] if runs else None)
    networks = {"The demo at its start": None} | ({} if run is None else {"The finished demo's last checkpoint": run})
    lines = [
        "# SelfCheck: errors of du/dt",
        "",
        *INTRODUCTION.format(starts=options.starts, samples=SAMPLES * options.starts).splitlines(),
        "",
    ]
    for title, of_run in networks.items():
        lines += section(title, gather(of_run, options.starts, options.faults, options.jobs))
        options.out.write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
