"""What test_adapter_runs.py looks at: training of adapters on one process and on two, by the means of ``ranks.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from emf_lightning.callbacks import SaveNetwork, WeightEMA
from emf_lightning.networks.adapter import Adapter
from emf_lightning.networks.prediction import PredictData
from emf_lightning.networks.sana import SanaFlowMap
from tests import ranks
from tests.ranks import JOINED, OWN, TEACHER, TINY, replicated, run, saver, sharded, train

SETTINGS = {"prediction": PredictData(), "time_scale": 10.0, "latent_size": 8, "context_width": 16}


def network(**arguments: Any) -> SanaFlowMap:
    torch.manual_seed(0)
    return SanaFlowMap(pretrained=sys.argv[1] + "/parent", adapter=Adapter(4, alpha=6.0), **SETTINGS, **arguments)


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
    for name in ("one", "parts"):  # Lightning puts the optimiser's state of DDP at the frozen weights' places, too
        path = out / name / "step=2.ckpt"
        train(out, f"fsdp2-from-{name}", own, WeightEMA(decay=0.5), ckpt_path=path, **sharded(2, name != "parts"))


def resumed(rank: int, out: Path) -> None:
    for name in ("saved", "one"):
        train(out, f"alone-from-{name}", JOINED, WeightEMA(decay=0.5), ckpt_path=out / name / "step=2.ckpt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    SanaFlowMap(TINY, **SETTINGS).save_pretrained(folder / "parent")
    ranks.network = network
    statuses = [run(1, alone, folder), run(2, together, folder), run(1, resumed, folder)]
    (folder / "statuses.json").write_text(json.dumps(statuses))
