"""What test_adapter_runs.py looks at: training of adapters on one process and on two, by the means of ``ranks.py``."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emf_lightning.callbacks import SaveNetwork, WeightEMA
from emf_lightning.modules.sharded_checkpoint import ShardedCheckpoints
from emf_lightning.networks.adapter import Adapter
from emf_lightning.networks.prediction import PredictData
from emf_lightning.networks.sana import SanaFlowMap
from tests import ranks
from tests.ranks import JOINED, OWN, TEACHER, TINY, complaint, replicated, run, saver, sgd, train

SETTINGS = {"prediction": PredictData(), "time_scale": 10.0, "latent_size": 8, "context_width": 16}


def network(**arguments: Any) -> SanaFlowMap:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"adapter": Adapter(4, alpha=6.0)} | SETTINGS | arguments
    return SanaFlowMap(pretrained=sys.argv[1] + "/parent", **settings)


def sharded(ranks: int, one_file: bool = True) -> dict[str, Any]:
    """FSDP2 as ``emf`` has it."""
    return {"strategy": ShardedCheckpoints(ranks, 1, save_distributed_checkpoint=not one_file), "devices": ranks}


def alone(rank: int, out: Path) -> None:
    train(out, "alone", JOINED, WeightEMA(decay=0.5), SaveNetwork())
    train(out, "alone-teacher", JOINED, model=TEACHER)


def together(rank: int, out: Path) -> None:
    own = OWN[rank]
    train(out, "ddp", own, WeightEMA(decay=0.5), SaveNetwork(), saver(out, "saved"), **replicated())
    train(out, "ddp-teacher", own, model=TEACHER, net={"gradient_checkpointing": True}, **replicated())
    train(out, "fsdp2", own, WeightEMA(decay=0.5), SaveNetwork(), saver(out, "one"), **sharded(2))
    train(out, "fsdp2-parts", own, WeightEMA(decay=0.5), saver(out, "parts"), **sharded(2, one_file=False))
    train(out, "fsdp2-teacher", own, model=TEACHER, **sharded(2))
    for name in ("one", "parts", "saved"):
        path = out / name / "step=2.ckpt"
        train(out, f"fsdp2-from-{name}", own, WeightEMA(decay=0.5), ckpt_path=path, **sharded(2, name != "parts"))
    train(out, "ddp-from-one", own, WeightEMA(decay=0.5), ckpt_path=out / "one" / "step=2.ckpt", **replicated())
    groups: dict[str, Any] = {"model": {"optimizer": grouped}}
    train(out, "grouped", own, WeightEMA(decay=0.5), saver(out, "groups"), **groups, **replicated())
    path = out / "groups" / "step=2.ckpt"
    train(out, "fsdp2-from-groups", own, WeightEMA(decay=0.5), ckpt_path=path, **groups, **sharded(2))


def grouped(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Groups in another order than the network's."""
    groups = [{"params": parameters[1::2]}, {"params": parameters[::2], "momentum": 0.5}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


OTHERS: dict[str, dict[str, Any]] = {
    "rank": {"net": {"adapter": Adapter(2, alpha=6.0)}},
    "targets": {"net": {"adapter": Adapter(4, alpha=6.0, target_modules=["to_q"])}},
    "no adapter": {"net": {"adapter": None}},
    "optimizer": {"model": {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.05)}},
    "tensors": {"model": {"optimizer": lambda parameters: sgd(parameters[:-1])}},
}
"""Settings that do not go with the checkpoint."""


def refused(rank: int, out: Path) -> None:
    said = {}
    strategies = {"ddp": (replicated, "saved"), "fsdp2": (sharded, "one"), "parts": (sharded, "parts")}
    for strategy, (settings, written) in strategies.items():
        for case, other in OTHERS.items():
            options = settings() if strategy == "ddp" else settings(2, strategy == "fsdp2")
            path = out / written / "step=2.ckpt"
            attempt = partial(train, out, f"{strategy}-{case}", OWN[rank], ckpt_path=path, **other, **options)
            said[f"{strategy}: {case}"] = complaint(attempt)
    if rank == 0:
        (out / "refused.json").write_text(json.dumps(said))


def resumed(rank: int, out: Path) -> None:
    for name in ("saved", "one"):
        train(out, f"alone-from-{name}", JOINED, WeightEMA(decay=0.5), ckpt_path=out / name / "step=2.ckpt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    SanaFlowMap(TINY, **SETTINGS).save_pretrained(folder / "parent")
    ranks.network = network
    statuses = [run(1, alone, folder), run(2, together, folder), run(2, refused, folder), run(1, resumed, folder)]
    (folder / "statuses.json").write_text(json.dumps(statuses))
