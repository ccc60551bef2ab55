"""Checkpoint files: written whole or not at all, and checked before they are used."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.utilities import rank_zero_warn

from emf_lightning.files import replacing
from emf_lightning.modules.checkpoint import damage_of


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their place, flushed and renamed, and checked when they are read.

    Lightning writes a file in ``$TMPDIR`` and copies it where that is another disk: a killed run leaves a torn file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        for partial in Path(path).parent.glob(".*.ckpt.partial"):  # of a killed run; this one has locked its directory
            partial.unlink(missing_ok=True)
        with replacing(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = lambda storage, _: storage, weights_only: Any = None
    ) -> dict[str, Any]:
        if _is_local_file_protocol(path) and Path(path).is_file():
            path = checked(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


def checked(path: Path) -> Path:
    """``whole_checkpoint`` of ``path``; a ``ValueError`` where that is damaged, too."""
    path = whole_checkpoint(path)
    if damage := damage_of(path):
        raise ValueError(f"{path}: {damage}; give another checkpoint")
    return path


def whole_checkpoint(path: Path) -> Path:
    """``path``, or where it is a damaged ``last*.ckpt`` the newest whole checkpoint beside it, with a warning."""
    damage = _unusable(path) if path.is_file() and path.stem.startswith("last") else None
    if damage is None:
        return path
    others = [other for other in path.parent.glob("*.ckpt") if other.is_file() and other != path]
    for other in sorted(others, key=lambda file: file.stat().st_mtime, reverse=True):
        if zipfile.is_zipfile(other) and _unusable(other) is None:
            rank_zero_warn(f"{path}: {damage}; {other}, the newest whole checkpoint beside it, is used instead")
            return other
    return path


def is_whole(path: Path) -> bool:
    """Whether a checkpoint, a file or a sharded one's folder, shows no damage."""
    return path.is_dir() or _unusable(path) is None


def _unusable(path: Path) -> str | None:
    """The damage of a checkpoint, also where torch alone sees it."""
    if damage := damage_of(path):
        return damage
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:  # whole, but with objects beside its tensors
        return None
    except Exception as error:  # its type depends on which bytes are wrong
        return f"it is damaged ({type(error).__name__})"
    return None
