"""Tiny checkpoints in the layouts that are published, made with the real classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from diffusers.models.normalization import AdaLayerNormSingle
from safetensors.torch import save_file

from tests import tiny_blip3o
from tests.text.test_pretrained import save_tokenizer

SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "sample_size": 4,
    "patch_size": 1,
    "interpolation_scale": None,
    "qk_norm": "rms_norm_across_heads",
}
"""A SANA-1.5 for latents of 4 x 4 x 4 and features of width 16."""

DC_AE = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8],
    "encoder_layers_per_block": [1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1],
    "encoder_qkv_multiscales": [[], [5], [5]],
    "decoder_qkv_multiscales": [[], [5], [5]],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
"""A DC-AE of the published kind that makes latents of 4 x 4 x 4 of 16 px."""


def sana(folder: Path, seed: int = 0, **changes: int) -> SanaTransformer2DModel:
    """A transformer, saved in ``folder``/transformer as a pipeline's repository has it."""
    torch.manual_seed(seed)
    model = SanaTransformer2DModel(**SANA | changes).eval()
    model.save_pretrained(str(folder / "transformer"))
    return model


def dc_ae(folder: Path, seed: int = 0) -> AutoencoderDC:
    """An autoencoder, saved in ``folder``/vae."""
    torch.manual_seed(seed)
    model = AutoencoderDC(**DC_AE).eval()
    model.save_pretrained(str(folder / "vae"))
    return model


def language_model(folder: Path, kind: str) -> None:
    """A tiny Gemma-2 or Qwen2 with a tokenizer, saved in ``folder``."""
    import transformers

    torch.manual_seed(0)
    config = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
    }
    if kind == "Gemma2":
        config["query_pre_attn_scalar"] = 8
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))
    model.save_pretrained(folder)
    save_tokenizer(folder)


def blip3o_next(folder: Path) -> None:
    """``folder``/diffusers with SANA and DC-AE, and ``folder``/blip3o, a whole BLIP3o-NEXT around that SANA."""
    stock = sana(folder / "diffusers", caption_channels=tiny_blip3o.CONTEXT)
    dc_ae(folder / "diffusers")
    inside = {f"model.sana.{name}": tensor.contiguous() for name, tensor in stock.state_dict().items()}
    tiny_blip3o.save_checkpoint(folder / "blip3o", shards=2, **inside)
    config = json.loads((folder / "blip3o/config.json").read_text())
    config["diffusion_name_or_path"] = str(folder / "diffusers")
    (folder / "blip3o/config.json").write_text(json.dumps(config))


def emf_time_embeds(width: int) -> dict[str, AdaLayerNormSingle]:
    """The two time embeddings that EMF's release puts beside SANA's."""
    return {f"time_embed_{name}": AdaLayerNormSingle(width) for name in "tr"}


def blip3o_checkpoint(
    folder: Path, diffusion: Path, model: SanaTransformer2DModel, extra: dict[str, AdaLayerNormSingle] | None = None
) -> None:
    """A BLIP3o-NEXT checkpoint in two files around ``model``, or with ``extra`` an EMF one.

    Only its SANA and its configuration are real; of the language model there is one tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "blip3o_qwen", "diffusion_name_or_path": str(diffusion)}
    (folder / "config.json").write_text(json.dumps(config))
    inside = {f"model.sana.{name}": tensor for name, tensor in model.state_dict().items()}
    for part, module in (extra or {}).items():
        inside |= {f"model.sana.{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    names = sorted(inside)
    files = {
        "model-00001-of-00002.safetensors": {"model.norm.weight": torch.ones(3)} | {n: inside[n] for n in names[::2]},
        "model-00002-of-00002.safetensors": {n: inside[n] for n in names[1::2]},
    }
    for file, tensors in files.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
