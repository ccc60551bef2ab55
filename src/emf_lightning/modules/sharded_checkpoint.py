"""Sharded checkpoints, a folder with a part of each rank: written whole or not at all, checked, read as plain data."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

from emf_lightning.digests import DIGESTS, read_digests, sha256
from emf_lightning.files import full_disk, to_json, write_atomic
from emf_lightning.modules.checkpoint_files import checked

INDEX, REST = ".metadata", "meta.pt"
"""Files of the folder: torch's index of its tensors, and all that is no weight or optimiser state."""

# Python 3.13 calls the module of paths another name
_PLAIN = {("torch", "Size"), ("torch.serialization", "_get_layout")}
_PLAIN |= {(module, "PosixPath") for module in ("pathlib", PosixPath.__module__)}
_KINDS = {module.__name__: module for module in (metadata, filesystem)}


class ShardedCheckpoints(ModelParallelStrategy):
    """Lightning's strategy, whose sharded checkpoints are written beside their place, renamed, and checked when read.

    Each rank computes the digests of its share of the files. ``emf`` takes it where an experiment names Lightning's.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f"{path.stem}.old{path.suffix}")
        if self.global_rank == 0:
            for stale in path.parent.glob(".*.partial"):  # of a killed run; this one has locked its directory
                shutil.rmtree(stale, ignore_errors=True)
        self.barrier()
        try:
            with _failures():
                super().save_checkpoint(checkpoint, partial, storage_options)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if (number := full_disk(error)) is not None:
                raise OSError(number, os.strerror(number), str(path)) from error
            raise
        self.barrier()  # rank 0 writes more than its part
        digests = self._digests(partial)
        if self.global_rank == 0:
            write_atomic(partial / DIGESTS, to_json(digests))
            _remove(old)
            if path.exists():  # no folder replaces another in one step: killed here, `last` finds the old one
                path.rename(old)
            partial.rename(path)
            _remove(old)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        path = self._whole(path) if path.is_dir() else checked(path)
        assert self.lightning_module is not None
        self.lightning_module.trainer.ckpt_path = str(path)  # callbacks read their part from there
        try:
            with _no_pickles(), _failures():
                self._check(path)
                if path.is_dir():
                    return super().load_checkpoint(path, weights_only=True)
                optimizers, self.optimizers = self.optimizers, []  # Lightning gives frozen weights some of their state
                try:
                    checkpoint = super().load_checkpoint(path, weights_only=True)
                finally:
                    self.optimizers = optimizers
                self._load_optimizers(checkpoint)
                return checkpoint
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"ckpt_path: {path} holds more than tensors and plain values, which may run code"
            ) from error

    def _check(self, path: Path) -> None:
        """Raises the module's ``ValueError`` for a checkpoint of another configuration, before tensors are loaded."""
        if check := getattr(self.lightning_module, "check_checkpoint", None):
            described = path / REST if path.is_dir() else path
            check(torch.load(described, map_location="cpu", weights_only=True, mmap=True), self.optimizers)

    def _load_optimizers(self, checkpoint: dict[str, Any]) -> None:
        """The optimisers' state of a checkpoint in one file, whichever strategy wrote it.

        The k-th parameter there is the k-th of the optimiser here, as in ``Optimizer.load_state_dict``.
        """
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            ours = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            theirs = [number for group in state["param_groups"] for number in group["params"]]
            name = dict(zip(theirs, ours, strict=True))
            groups = [group | {"params": [name[each] for each in group["params"]]} for group in state["param_groups"]]
            named: dict[str, Any] = {
                "state": {name[each]: value for each, value in state["state"].items()},
                "param_groups": groups,
            }
            set_optimizer_state_dict(self.model, optimizer, named, options=options)

    def _whole(self, path: Path) -> Path:
        """``path``, or where it is a damaged ``last*.ckpt`` the newest whole one beside it. Every rank must call it."""
        others = [other for other in path.parent.glob("*.ckpt") if other.is_dir() and other != path]
        others.sort(key=os.path.getmtime, reverse=True)
        damage = None
        for found in self.broadcast([path, *(others if path.stem.startswith("last") else [])]):
            reason = self._damage(found)
            if reason is None and damage is not None:
                rank_zero_warn(f"{path}: {damage}; {found}, the newest whole checkpoint beside it, is used instead")
            if reason is None:
                return Path(found)
            damage = damage or reason
        raise ValueError(f"ckpt_path: {path}: {damage}; give another checkpoint")

    def _damage(self, folder: Path) -> str | None:
        try:
            check_index(folder)
            wanted = read_digests(folder)
        except ValueError as error:
            return str(error)
        found = self._digests(folder) if wanted else {}
        wrong = next((name for name, digest in wanted.items() if found.get(name) != digest), None)
        return None if wrong is None else f"it is damaged: {wrong} is not the content that was saved"

    def _digests(self, folder: Path) -> dict[str, str]:
        """Digests of the files in ``folder``, each computed by one rank."""
        names = self.broadcast(sorted(path.name for path in folder.iterdir() if path.name != DIGESTS))
        parts: list[dict[str, str]] = [{}] * self.world_size
        mine = names[self.global_rank :: self.world_size]
        dist.all_gather_object(parts, {name: sha256(folder / name) for name in mine})
        return {name: digest for part in parts for name, digest in part.items()}


def check_index(folder: Path) -> None:
    """Raises a ``ValueError`` where a sharded checkpoint's own pickles are damaged, or name what no checkpoint has."""
    for name in (INDEX, REST):
        try:
            with (folder / name).open("rb") as file:
                if name == INDEX:
                    _IndexReader(file).load()
                else:
                    torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # its type depends on which bytes are wrong
            reason = f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            raise ValueError(f"{folder / name} cannot be read as part of a sharded checkpoint {reason}") from error


class _IndexReader(pickle.Unpickler):
    """Reads an index: torch's descriptions of tensors and files, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        found = vars(_KINDS[module]).get(name) if module in _KINDS else None  # no way through to what they import
        if isinstance(found, type) and found.__module__ == module and (is_dataclass(found) or issubclass(found, Enum)):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _failures() -> Iterator[None]:
    """Raises the first rank's error in place of torch's list of them, which is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


@contextmanager
def _no_pickles() -> Iterator[None]:
    """A context in which torch reads tensors and plain values alone, where Lightning and torch ask for anything."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
