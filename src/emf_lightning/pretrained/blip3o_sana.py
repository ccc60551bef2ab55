"""The SANA inside a BLIP3o-NEXT or EMF checkpoint, which holds a language model and a SANA in one folder."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from emf_lightning.pretrained.configs import CONFIGS
from emf_lightning.pretrained.files import config_of, tensors_of

PREFIX = "model.sana."
"""Prefix of the names of SANA's tensors in such a checkpoint."""

_SIZE = CONFIGS["Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers/transformer"]

_EMF = {"_flow_interval": "SummedInterval()", "_flow_prediction": "PredictVelocity()", "_flow_time_scale": 1.0}
"""Parametrization of EMF's release: raw t, and the plain sum of two whole time embeddings (arXiv 2604.18168)."""


def has_blip3o_sana(name: str) -> bool:
    """True for a folder or hub name of a BLIP3o-NEXT or EMF checkpoint, False for a diffusers model."""
    try:
        return str(config_of(name).get("model_type", "")).startswith("blip3o")
    except OSError:
        return False


def blip3o_sana_tensors(name: str) -> dict[str, Tensor]:
    """The SANA's weights by this package's names; raises ValueError if there are none.

    EMF's has three time embeddings: ``time_embed_t`` becomes ours, ``time_embed_r``, which takes t - r, the interval's,
    and ``time_embed``, which its forward pass no longer reads, is left out.
    """
    tensors = tensors_of(name, PREFIX)
    if not tensors:
        raise ValueError(f"{name}: a BLIP3o checkpoint without {PREFIX}*, so without a SANA to start from")
    if not any(key.startswith("time_embed_t.") for key in tensors):
        return tensors
    return {
        key.replace("time_embed_t.", "time_embed.").replace("time_embed_r.", "time_embed.interval."): tensor
        for key, tensor in tensors.items()
        if not key.startswith("time_embed.")
    }


def blip3o_sana_config(name: str, tensors: Collection[str] = ()) -> dict[str, Any]:
    """The configuration at ``diffusion_name_or_path``, or SANA-1.5 1.6B's if that is a path of the authors' machine.

    Args:
        name: of the checkpoint.
        tensors: names of ``blip3o_sana_tensors``, which tell its size and its parametrization; none for planning.
            Loading them into a network of another size raises later.
    """
    parametrization = _EMF if any(key.startswith("time_embed.interval.") for key in tensors) else {}
    try:
        return config_of(str(config_of(name)["diffusion_name_or_path"]), "transformer") | parametrization
    except (OSError, KeyError):
        if not tensors:
            return dict(_SIZE)
    blocks = {key.split(".")[1] for key in tensors if key.startswith("transformer_blocks.")}
    qk_norm = "rms_norm_across_heads" if any(".attn1.norm_q." in key for key in tensors) else None
    return _SIZE | {"num_layers": len(blocks), "qk_norm": qk_norm} | parametrization
