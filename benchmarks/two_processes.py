"""Trains each backbone by MeanFlow on two processes, by DDP and FSDP2, and on one: the difference of the weights.

The two processes (gloo, CPU) train on half of the one's batch each. ``docs/results/backbones.md`` has the figures.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import ranks

from benchmarks.tiny_backbones import BACKBONES, SIDE, WIDTH, Backbone
from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.optimization import Optimization
from emf_lightning.modules.sharded_checkpoint import ShardedCheckpoints
from emf_lightning.text.base import TextFeatures

STEPS, TOKENS = 2, 8
FOUND = "two_processes.json"


def sharded() -> dict[str, Any]:
    """FSDP2 as ``emf`` has it."""
    return {"strategy": ShardedCheckpoints(2, 1), "devices": 2}


WAYS: dict[str, Callable[[], dict[str, Any]]] = {"DDP": ranks.replicated, "FSDP2": sharded}


class Batches(ranks.Batches):
    """Latents and captions of each row's own, the captions of several lengths."""

    def __init__(self, backbone: Backbone, places: list[ranks.Place]) -> None:
        self.channels, self.places = backbone.channels, places

    def __getitem__(self, index: int) -> CaptionImageBatch:
        generators = [torch.Generator().manual_seed(64 * index + 8 * rank + row) for rank, row in self.places]
        latents = torch.stack([torch.randn(self.channels, SIDE, SIDE, generator=each) for each in generators])
        context = torch.stack([torch.randn(TOKENS, WIDTH, generator=each) for each in generators])
        lengths = torch.tensor([TOKENS - row for _, row in self.places])
        text = TextFeatures(context, torch.arange(TOKENS) < lengths[:, None])
        return CaptionImageBatch(latents, text, TextFeatures(context[:1], text.mask[:1]), ("",) * len(latents))


class Weights(Callback):
    """The weights after training, whole."""

    def on_train_end(self, trainer: Trainer, module: Any) -> None:  # type: ignore[override]
        self.whole = ranks.whole(module.net.named_parameters())


def trained(name: str, places: list[ranks.Place], checkpointing: bool = False, **settings: Any) -> dict[str, Tensor]:
    """The weights of a backbone after ``STEPS`` steps on the rows at ``places``."""
    backbone, weights = BACKBONES[name], Weights()
    net = backbone.build(gradient_checkpointing=checkpointing)
    objective = MeanFlow(times=ranks.GivenTimes(places, 1))
    module = FlowMapModule(net, objective, optimization=Optimization(ranks.sgd), caption_dropout=0.0)
    ranks.fit(module, Batches(backbone, places), max_steps=STEPS, callbacks=[weights], **settings)
    return weights.whole


def alone(out: Path, names: Sequence[str]) -> None:
    """Leaves each backbone's weights before and after training on all rows."""
    for number, name in enumerate(names):
        before = {key: each.detach().clone() for key, each in BACKBONES[name].build().named_parameters()}
        torch.save((before, trained(name, ranks.JOINED)), out / f"{number}.pt")


def together(rank: int, out: Path, names: Sequence[str]) -> None:
    """Leaves the figures of all backbones and ways."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for number, name in enumerate(names):
        before, after = torch.load(out / f"{number}.pt")
        found[name]["moved"] = difference(before, after)
        for (way, settings), checkpointing in itertools.product(WAYS.items(), (False, True)):
            key = f"{way}, checkpointing" if checkpointing else way
            try:
                found[name][key] = difference(trained(name, ranks.OWN[rank], checkpointing, **settings()), after)
            except Exception as error:  # its type depends on what the strategy does
                found[name][key] = f"no: {type(error).__name__}, {str(error).partition('.')[0]}"
    if rank == 0:
        (out / FOUND).write_text(json.dumps(found))


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The greatest relative difference of a parameter."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - each).norm() / each.norm()) for key, each in theirs.items())


def cell(found: dict[str, Any], way: str) -> str:
    """The difference without and with checkpointing, or why there is none."""
    plain, checkpointed = (found[key] for key in (way, f"{way}, checkpointing"))
    if isinstance(plain, str) or isinstance(checkpointed, str):
        return plain if isinstance(plain, str) else f"{plain:.0e}; with checkpointing {checkpointed}"
    return f"{max(plain, checkpointed):.0e}"


def measure(out: Path, names: Sequence[str] = tuple(BACKBONES)) -> dict[str, dict[str, Any]]:
    """Backbone -> way -> the difference, in a process that has run nothing: its forks inherit no autograd engine."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    statuses = ranks.run(1, lambda rank, out: alone(out, names), out)
    statuses += ranks.run(2, lambda rank, out: together(rank, out, names), out)
    assert not any(statuses), "a process failed; it said why"
    found: dict[str, dict[str, Any]] = json.loads((out / FOUND).read_text())
    return found
