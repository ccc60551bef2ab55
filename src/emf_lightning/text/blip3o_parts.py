"""Modules and tokenizer of a BLIP3o-NEXT checkpoint's text conditioning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from emf_lightning.pretrained.loading import PretrainedWeights, read_model
from emf_lightning.text.blip3o_checkpoint import IMAGES, BLIP3oCheckpoint


def make_connector(hidden: int, width: int) -> nn.Sequential:
    """Maps hidden states to SANA's context: two linear layers and a norm."""
    from diffusers.models.normalization import RMSNorm

    norm = RMSNorm(width, eps=1e-5)
    return nn.Sequential(nn.Linear(hidden, width), nn.GELU(approximate="tanh"), nn.Linear(width, width), norm)


def vision_config(checkpoint: BLIP3oCheckpoint, image_size: int, heads: int) -> Any:
    """Configuration of the checkpoint's vision tower, inferred from its tensor shapes.
    Raises ``ValueError`` if there is no vision tower, or it does not fit ``image_size`` and ``heads``.
    """
    from transformers import SiglipVisionConfig

    place, shapes = f"{IMAGES}encoder.", checkpoint.shapes
    try:
        width, _, patch, _ = shapes[f"{place}embeddings.patch_embedding.weight"]
        positions = shapes[f"{place}embeddings.position_embedding.weight"][0]
        inner = shapes[f"{place}encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise checkpoint.fault(f"lacks the image tokenizer: there is no {error}") from error
    if (image_size // patch) ** 2 != positions or width % heads:
        raise checkpoint.fault(
            f"has an image tokenizer of {positions} patches of {patch} pixels and width {width}, which fits neither "
            f"image_size={image_size} nor image_heads={heads} as it should"
        )
    layers = {name[len(place) :].split(".")[2] for name in shapes if name.startswith(f"{place}encoder.layers.")}
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch,
    )


def load_tokenizer(checkpoint: BLIP3oCheckpoint) -> Any:
    from transformers import AutoTokenizer

    config = checkpoint.config
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, config=qwen_config(config))
    except (OSError, ValueError) as error:
        raise checkpoint.fault(f"has no readable tokenizer ({str(error).strip().splitlines()[0]})") from error
    for token, number in (
        ("<im_start>", config["image_start_tag_id"]),
        ("<S0>", config["scale_start_token_id"]),
        ("<I0>", config["image_start_token_id"]),
        (f"<I{config['num_image_tokens'] - 1}>", config["image_start_token_id"] + config["num_image_tokens"] - 1),
    ):
        if (found := tokenizer.convert_tokens_to_ids(token)) != number:
            raise checkpoint.fault(f"says that {token} is token {number}, its tokenizer that it is {found}")
    return tokenizer


def qwen_config(config: dict[str, Any]) -> Any:
    """Configuration of the language model alone, as a Qwen3."""
    from transformers import Qwen3Config

    return Qwen3Config.from_dict({**config, "model_type": "qwen3", "rope_scaling": None, "auto_map": None})


def load_language_model(checkpoint: BLIP3oCheckpoint, config: Any, dtype: torch.dtype) -> Any:
    from transformers import Qwen3ForCausalLM

    try:
        loaded = read_model(Qwen3ForCausalLM, PretrainedWeights(str(checkpoint.folder)), dtype, config=config)
    except (OSError, RuntimeError, ValueError) as error:
        raise checkpoint.fault(f"holds another language model than its config.json says ({error})") from error
    if wrong := loaded.missing + loaded.mismatched:
        raise checkpoint.fault(f"holds another language model than its config.json says (see {min(wrong)})")
    return loaded.model
