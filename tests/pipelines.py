"""Tiny pipelines in published layouts, and data sets in the hub's, by the real classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

WORDS = ["a", "photo", "of", "red", "blue", "cat", "dog", "and", "two"]
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
CLIP = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}


def tokenizer(folder: Path) -> None:
    """Words for tokens; each text ends in </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


def vae(folder: Path, **settings):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(**(VAE | settings)).eval()
    model.save_pretrained(str(folder))
    return model


def stable_diffusion_15(folder: Path) -> Path:
    """unet, vae, text_encoder and tokenizer: latents of 4 channels, half as large as images."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    ).save_pretrained(str(folder / "unet"))
    vae(folder / "vae", scaling_factor=0.18215)
    CLIPTextModel(CLIPTextConfig(**CLIP, max_position_embeddings=77)).save_pretrained(folder / "text_encoder")
    tokenizer(folder / "tokenizer")
    return folder


def stable_diffusion_3(folder: Path) -> Path:
    """transformer, vae, and three text encoders with their tokenizers."""
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
    ).save_pretrained(str(folder / "transformer"))
    vae(folder / "vae", scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    for name, projection in (("", 8), ("_2", 16)):
        config = CLIPTextConfig(**CLIP, max_position_embeddings=77, projection_dim=projection)
        CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{name}")
        tokenizer(folder / f"tokenizer{name}")
    t5(folder, "_3")
    return folder


def t5(folder: Path, name: str = "") -> None:
    """A T5 of width 40 in ``text_encoder<name>``, and its tokenizer."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32, d_model=40, d_kv=8, d_ff=24, num_layers=2, num_heads=2, is_encoder_decoder=False)
    T5EncoderModel(config).save_pretrained(folder / f"text_encoder{name}")
    tokenizer(folder / f"tokenizer{name}")


def flux(folder: Path) -> Path:
    """transformer with a guidance input, vae, CLIP and T5 with their tokenizers."""
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).save_pretrained(str(folder / "transformer"))
    vae(folder / "vae", scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    CLIPTextModel(CLIPTextConfig(**CLIP, max_position_embeddings=77)).save_pretrained(folder / "text_encoder")
    tokenizer(folder / "tokenizer")
    t5(folder, "_2")
    return folder


def cifar10(folder: Path, rows: int = 24) -> Path:
    """A local copy in the form of uoft-cs/cifar10: parquet files of ``img`` and ``label``."""
    return _dataset(folder, rows, 32, "img", ["airplane", "automobile", "bird"])


def celeba_hq(folder: Path, rows: int = 16, side: int = 20) -> Path:
    """A local copy in the form of korexyz/celeba-hq-256x256: ``image`` and ``label``."""
    return _dataset(folder, rows, side, "image", ["female", "male"])


def _dataset(folder: Path, rows: int, side: int, column: str, classes: list[str]) -> Path:
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PilImage

    rng = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", rows), ("test", rows // 2)):
        images = [PilImage.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(count)]
        columns = {column: images, "label": [i % len(classes) for i in range(count)]}
        features = Features({column: Image(), "label": ClassLabel(names=classes)})
        made = Dataset.from_dict(columns, features=features)
        made.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder
