"""The SANA inside a BLIP3o-NEXT or EMF checkpoint, which holds a language model and a SANA in one folder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from emf_lightning.pretrained.configs import CONFIGS
from emf_lightning.pretrained.files import config_of, tensors_of

PREFIX = "model.sana."
"""Prefix of the names of SANA's tensors in such a checkpoint."""

_SIZE = CONFIGS["Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers/transformer"]

EMF_PARAMETRIZATION = {"interval": "SummedInterval()", "prediction": "PredictVelocity()", "time_scale": 1.0}
"""Parametrization of EMF's release: raw t, and the plain sum of two whole time embeddings (arXiv 2604.18168)."""


@dataclass(frozen=True)
class Blip3oSana:
    """A SANA from such a checkpoint, with this package's names.

    Attributes:
        config: diffusers' configuration of the transformer.
        tensors: its weights by name.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def has_blip3o_sana(name: str) -> bool:
    """True for a folder or hub name of a BLIP3o-NEXT or EMF checkpoint, False for a diffusers model."""
    try:
        return str(config_of(name).get("model_type", "")).startswith("blip3o")
    except OSError:
        return False


def read_blip3o_sana(name: str) -> Blip3oSana:
    """The SANA of a BLIP3o-NEXT checkpoint, or of an EMF one.

    EMF's has three time embeddings: ``time_embed_t`` becomes ours, ``time_embed_r``, which takes t - r, the interval's,
    and ``time_embed``, which its forward pass no longer reads, is left out.

    Raises:
        ValueError: if it holds no SANA.
    """
    tensors = tensors_of(name, PREFIX)
    if not tensors:
        raise ValueError(f"{name}: a BLIP3o checkpoint without {PREFIX}*, so without a SANA to start from")
    config = blip3o_sana_config(name, tensors)
    if any(key.startswith("time_embed_t.") for key in tensors):
        tensors = {_ours(key): tensor for key, tensor in tensors.items() if not key.startswith("time_embed.")}
        config |= {f"_flow_{key}": value for key, value in EMF_PARAMETRIZATION.items()}
    return Blip3oSana(config, tensors)


def _ours(key: str) -> str:
    return key.replace("time_embed_t.", "time_embed.").replace("time_embed_r.", "time_embed.interval.")


def blip3o_sana_config(name: str, tensors: Collection[str] = ()) -> dict[str, Any]:
    """The configuration at ``diffusion_name_or_path``, or SANA-1.5 1.6B's if that is a path of the authors' machine.

    Args:
        name: of the checkpoint.
        tensors: names of its SANA's tensors, for what they tell of its size; none for planning. Loading them into a
            network of another size raises later.
    """
    try:
        return config_of(config_of(name)["diffusion_name_or_path"], "transformer")
    except (OSError, KeyError):
        if not tensors:
            return dict(_SIZE)
    blocks = {key.split(".")[1] for key in tensors if key.startswith("transformer_blocks.")}
    normed = any(".attn1.norm_q." in key for key in tensors)
    return _SIZE | {"num_layers": len(blocks), "qk_norm": "rms_norm_across_heads" if normed else None}
