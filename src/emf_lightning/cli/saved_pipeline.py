"""Check of an exported folder: it loads, and with the weights that were exported."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from emf_lightning.exported_files import KINDS
from emf_lightning.part_classes import trusted
from emf_lightning.pipeline import EMFPipeline
from emf_lightning.pipeline_part import saves
from emf_lightning.text.plain import shorten


def check_saved(pipeline: EMFPipeline, folder: Path) -> None:
    """Loads ``folder``, into which ``pipeline`` was written, once, as its users will.

    Raises:
        ValueError: if that fails, or gives a network, an autoencoder or a text encoder with other weights.
    """
    try:
        with isolate_rng():
            for draw_anew in (torch.seed, np.random.seed, random.seed):  # random weights must not agree by chance
                draw_anew()
            loaded = type(pipeline).from_pretrained(folder, trust_remote_code=trusted())
    except Exception as error:  # of classes of the user's own
        reason = shorten(str(error) or type(error).__name__, 300)
        raise ValueError(
            f"the written pipeline cannot be loaded ({reason}); a class is built again from the arguments of its "
            "constructor"
        ) from error
    for place in KINDS:
        part = getattr(pipeline, place).part
        own, other = part.state_dict(), getattr(loaded, place).part.state_dict()
        if differing := [name for name in own if not _same(own[name], other.get(name))]:
            raise ValueError(f"the written pipeline loads with other weights ({differing[0]}, ...): {_remedy(part)}")


def _remedy(part: nn.Module) -> str:
    """The change to make in a class that loads with other weights."""
    name = type(part).__name__
    if saves(part):
        return f"{name}.save_pretrained must write what its argument `pretrained` reads"
    return (
        f"{name} is built again from the arguments of its constructor, which must give the same weights: load them "
        "from a file that an argument names, or from a seed"
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two entries of a state are equal, on whatever device and in whatever precision they are."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other or bool(one == other)
    return one.shape == other.shape and torch.equal(one.cpu().float(), other.cpu().float())
