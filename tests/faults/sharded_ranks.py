"""What test_sharded_checkpoints.py looks at: two ranks that save, or refuse to, load damaged copies, and are killed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from emf_lightning.callbacks import WeightEMA
from emf_lightning.callbacks.save_last_state import SaveLastState
from emf_lightning.modules.sharded_checkpoint import ShardedCheckpoints
from tests.callbacks import tiny
from tests.ranks import complaint, run

CANARY = "canary"


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_bomb(path: Path) -> None:
    """A part whose plain values are pickles of a stranger: torch reads those between its tensors."""
    torch.save(Bomb(), path) if path.suffix == ".pt" else path.write_bytes(pickle.dumps(Bomb()))


FILES = (".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp")
DAMAGE: dict[str, Callable[[Path], None]] = {
    "no damage": lambda folder: None,
    **{f"{name} flipped at {at}": lambda f, n=name, at=at: flip(f / n, at) for name in FILES for at in (0.0, 0.3, 0.9)},
    **{f"{name} short": lambda folder, name=name: short(folder / name) for name in FILES},
    **{f"{name} missing": lambda folder, name=name: (folder / name).unlink() for name in FILES},
    **{f"{name} of another": lambda f, n=name: shutil.copy(f.parent / "step=2.ckpt" / n, f / n) for name in FILES[1:]},
    "digests.json flipped": lambda folder: flip(folder / "digests.json", 0.5),
    "digests.json short": lambda folder: short(folder / "digests.json"),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    ".metadata of a stranger": lambda folder: with_bomb(folder / ".metadata"),
    "meta.pt of a stranger": lambda folder: with_bomb(folder / "meta.pt"),
}


FEW = ("no damage", ".metadata flipped at 0.3", "__1_0.distcp flipped at 0.3", "__0_0.distcp missing", "empty")


class Tries(Callback):
    """Loads damaged copies of the run's checkpoints: last.ckpt, and the one of step 4 by its own name."""

    def __init__(self, out: Path, names: Iterable[str]) -> None:
        self.out, self.names = out, names

    def on_train_end(self, trainer, module):
        found = {}
        for name in self.names:
            for target in ("last.ckpt", "step=4.ckpt"):
                place = self.out / "damaged"
                dist.barrier()  # both have read it
                if trainer.is_global_zero:
                    shutil.rmtree(place, ignore_errors=True)
                    shutil.copytree(self.out / "run", place)
                    os.utime(place / "step=2.ckpt", (1, 1))
                    DAMAGE[name](place / target)
                dist.barrier()
                steps = []
                load = partial(trainer.strategy.load_checkpoint, place / target)
                said = complaint(lambda load=load, steps=steps: steps.append(load()["global_step"]))
                found[f"{name}: {target}"] = said.replace(str(place), "") or steps[0]
        (self.out / f"damaged-{trainer.global_rank}.json").write_text(json.dumps(found))


def train(out: Path, *callbacks: Callback, steps: int = 5, ckpt_path: Path | None = None) -> None:
    saver = ModelCheckpoint(out / "run", "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    trainer = tiny.trainer(
        out / "log",
        *(WeightEMA(decay=0.5), SaveLastState(), saver, *callbacks),
        enable_checkpointing=True,
        max_steps=steps,
        strategy=ShardedCheckpoints(2, 1),
        devices=2,
    )
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(out.parent / "shards"), ckpt_path=ckpt_path)


def damaged(names: Iterable[str], rank: int, out: Path) -> None:
    os.chdir(out)
    train(out, Tries(out, names))


def killed(point: int, rank: int, out: Path) -> None:
    """Rank 0 dies before it renames for the ``point``-th time, or removes the folder that was replaced (point 0)."""
    renames = []

    def look(event: str, arguments: tuple[object, ...]) -> None:
        name = str(arguments[0]) if event in ("os.rename", "shutil.rmtree") else ""
        if str(out / "run") not in name or name.endswith(".metadata.tmp"):  # that torch renames, inside the folder
            return
        renames.append(event)
        there = point == 0 and event == "shutil.rmtree" and name.endswith(".old.ckpt")
        if there or (point and event == "os.rename" and renames.count(event) == point):
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        sys.addaudithook(look)
    train(out)


class Poisons(Callback):
    """Makes a part of the weights that rank 1 holds infinite, before step 4 is saved."""

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 4 and trainer.global_rank == 1:
            next(module.net.parameters()).data.to_local().fill_(torch.inf)


def poisoned(rank: int, out: Path) -> None:
    (out / f"said-{rank}.txt").write_text(complaint(lambda: train(out, Poisons())))


def resumed(rank: int, out: Path) -> None:
    last = max((out / "run").glob("last*.ckpt"), key=os.path.getmtime)
    train(out, steps=6, ckpt_path=last)


def main(folder: Path, names: str, points: Iterable[int]) -> None:
    """Runs of two ranks in ``folder``: ``all`` or ``few`` kinds of damage, and a kill at each of ``points``."""
    tiny.shards(folder / "shards")
    parts = {"damaged": [partial(damaged, DAMAGE if names == "all" else FEW)]}
    parts["poisoned"] = [poisoned]
    parts |= {f"killed-{point}": [partial(killed, point), resumed] for point in points}
    statuses = {}
    for name, steps in parts.items():
        (folder / name).mkdir()
        statuses[name] = [run(2, step, folder / name) for step in steps]
    (folder / "statuses.json").write_text(json.dumps(statuses))
