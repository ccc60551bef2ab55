"""The SANA inside a BLIP3o-NEXT or EMF checkpoint: one folder holds a language model and everything around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from emf_lightning.pretrained.configs import CONFIGS
from emf_lightning.pretrained.files import config_of, tensors_of

PREFIX = "model.sana."
"""What the names of SANA's tensors begin with there."""

_SIZE = CONFIGS["Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers/transformer"]

EMF_MEANING = {"interval": "SummedInterval()", "prediction": "PredictVelocity()", "time_scale": 1.0}
"""How EMF's release reads its weights: raw t, and the plain sum of two whole time embeddings (arXiv 2604.18168)."""


@dataclass(frozen=True)
class ReleasedSana:
    """A SANA from such a checkpoint, in our names.

    Attributes:
        config: diffusers' configuration of the transformer.
        tensors: its weights by name.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def is_released(name: str) -> bool:
    """Whether a folder or hub name holds a BLIP3o-NEXT or EMF checkpoint rather than a diffusers model."""
    try:
        return str(config_of(name).get("model_type", "")).startswith("blip3o")
    except OSError:
        return False


def read_released(name: str) -> ReleasedSana:
    """The SANA of a BLIP3o-NEXT checkpoint, or of an EMF one.

    EMF's has three time embeddings: ``time_embed_t`` becomes ours, ``time_embed_r``, which takes t - r, the interval's,
    and ``time_embed``, which its forward pass no longer reads, is left out.

    Raises:
        ValueError: where it holds no SANA.
    """
    tensors = tensors_of(name, PREFIX)
    if not tensors:
        raise ValueError(f"{name}: a BLIP3o checkpoint without {PREFIX}*, so without a SANA to start from")
    config = _config(name, tensors)
    if any(key.startswith("time_embed_t.") for key in tensors):
        tensors = {_ours(key): tensor for key, tensor in tensors.items() if not key.startswith("time_embed.")}
        config |= {f"_flow_{what}": value for what, value in EMF_MEANING.items()}
    return ReleasedSana(config, tensors)


def released_config(name: str) -> dict[str, Any]:
    """The size of its SANA where no weights are read, for planning."""
    return _config(name, {})


def _ours(key: str) -> str:
    return key.replace("time_embed_t.", "time_embed.").replace("time_embed_r.", "time_embed.interval.")


def _config(name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What ``diffusion_name_or_path`` says; often a path of the authors' machine, then SANA-1.5 1.6B as far as known.

    A network of another size is found out when the tensors are loaded into it.
    """
    try:
        return config_of(config_of(name)["diffusion_name_or_path"], "transformer")
    except (OSError, KeyError):
        if not tensors:
            return dict(_SIZE)
    blocks = {key.split(".")[1] for key in tensors if key.startswith("transformer_blocks.")}
    normed = any(".attn1.norm_q." in key for key in tensors)
    return _SIZE | {"num_layers": len(blocks), "qk_norm": "rms_norm_across_heads" if normed else None}
