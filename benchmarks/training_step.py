"""Measures the whole training step of an experiment: Lightning against a loop by hand, other derivatives, compilation.

A step is a batch's reading and encoding, forward and backward passes, the optimizer's step and the average of the
weights. Writes into docs/performance.md; `python -m benchmarks.training_step --help` names the options.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.pages import MACHINE, rows, write_tables
from emf_lightning.callbacks import WeightEMA
from emf_lightning.cli.parsing.builder import BuildingCLI
from emf_lightning.cli.parsing.experiment_files import expand
from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.derivative.forward_mode import ForwardMode, Fused
from emf_lightning.flow.velocity import Velocity
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.frozen import FrozenNetwork

DECAY = 0.995


class AllRows(Derivative):
    """du/dt of all rows, also of those with r = t, as the releases take it.

    Args:
        kind: ``ForwardMode(fast=False)``, without a graph and beside u, is the pattern of py-meanflow and of FastGen;
            ``Fused()``, whose one pass records a graph of both, is that of EMF's release, without its casts.
    """

    def __init__(self, kind: Derivative) -> None:
        super().__init__()
        self.kind = kind

    def jvp(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return self.kind.jvp(u, z, r, t, v)

    def __call__(self, u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
        value, dudt = self.kind(u, z, r, t, v, len(z))
        return value, dudt[:n]


class Clock(Callback):
    """CPU time at the end of each step of a fit."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.process_time())


@dataclass
class Way:
    """One way to take steps.

    Attributes:
        steps: takes a number of steps and returns CPU seconds of each.
        seconds: of a step, measured so far.
    """

    steps: Callable[[int], list[float]]
    seconds: list[float] = field(default_factory=list)


class Training:
    """An experiment's model and data, and ways to train it.

    Args:
        experiment: its file.
        batch_size: of all ways.
    """

    def __init__(self, experiment: str, batch_size: int) -> None:
        options = [f"--data.batch_size={batch_size}", "--data.num_workers=0"]
        built = BuildingCLI.run(expand(["fit", "--config", experiment, *options]))
        self.model, self.data = built.model, built.datamodule
        self.data.setup("fit")

    def by_lightning(self, compiled: bool = False) -> Way:
        """The project's step."""
        model = copy.deepcopy(self.model)
        if compiled:
            model.net.compile_blocks()

        def steps(count: int) -> list[float]:
            clock = Clock()
            trainer = Trainer(
                max_steps=count + 1,
                precision="bf16-mixed",
                accelerator="cpu",
                gradient_clip_val=1.0,
                callbacks=[clock, WeightEMA(decay=DECAY)],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                use_distributed_sampler=False,
            )
            trainer.fit(model, datamodule=self.data)
            return [after - before for before, after in pairwise(clock.ends)]

        return Way(steps)

    def by_hand(self, derivative: Derivative | None = None) -> Way:
        """The same step as a loop, with its own derivative or another one."""
        net: FlowMapNetwork = copy.deepcopy(self.model.net)
        objective = copy.deepcopy(self.model.objective)
        objective.velocity.teacher = FrozenNetwork(net)
        if derivative is not None:
            objective.derivative = derivative
        optimizer = self.model.optimization.build(net.parameters())[0]
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        batches = self._batches()

        def step() -> float:
            began = time.process_time()
            batch = self.data.encoder.encode(next(batches))
            with torch.autocast("cpu", torch.bfloat16):
                terms = objective(
                    net,
                    batch.latents,
                    batch.text.conditioning,
                    progress=1.0,
                    null_context=batch.null.conditioning,
                    dropped=torch.zeros(len(batch), dtype=torch.bool),
                )
            optimizer.zero_grad()
            terms.loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(net)
            return time.process_time() - began

        return Way(lambda count: [step() for _ in range(count)])

    def _batches(self) -> Iterator[Any]:
        while True:
            yield from self.data.train_dataloader()


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="experiments/shapes/emf.yaml")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="of each way in a round")
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    training = Training(options.experiment, options.batch_size)
    without_graph, with_graph = AllRows(ForwardMode(fast=False)), AllRows(Fused())
    ways: dict[str, Callable[[], Way]] = {
        "this project": training.by_lightning,
        "this project, blocks compiled": partial(training.by_lightning, compiled=True),
        "the same step in a loop by hand": training.by_hand,
        "by hand, du/dt of all rows without a graph (py-meanflow, FastGen)": partial(training.by_hand, without_graph),
        "by hand, du/dt of all rows with a graph (EMF's release)": partial(training.by_hand, with_graph),
    }
    measured, first = {}, {}
    for name, make in ways.items():
        measured[name] = make()
        began = time.process_time()
        measured[name].steps(2)
        first[name] = time.process_time() - began
    for _ in range(options.rounds):
        for way in measured.values():
            way.seconds.append(statistics.median(way.steps(options.steps)))
    base = measured["this project"].seconds
    cells = []
    for name, way in measured.items():
        ratios = [mine / theirs for mine, theirs in zip(way.seconds, base, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        spread = f"{median:.2f} ± {(high - low) / 2:.2f}"
        cells.append([name, 1e3 * statistics.median(way.seconds), spread, first[name]])
    how = (
        f"`python -m benchmarks.training_step`: {options.experiment}, batches of {options.batch_size}, one thread, CPU "
        f"time; medians of {options.steps} steps in each of {options.rounds} rounds; {MACHINE}."
    )
    table = rows(["step", "ms", "of this project's", "start and first two steps, s"], cells)
    write_tables(options.out, {"STEP": [how, "", *table]})


if __name__ == "__main__":
    main()
