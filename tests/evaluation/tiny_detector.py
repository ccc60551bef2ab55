"""A Mask2Former of transformers' class, small enough to be made and taught here."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig


def save_tiny(folder: Path, num_labels: int = 80, lost: str | None = None) -> str:
    """The folder with a random network in it; weights whose names begin with ``lost`` are left out."""
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64,
        embed_dim=12,
        depths=[1] * 4,
        num_heads=[1, 2, 3, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_attention_heads=4,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=20,
        num_labels=num_labels,
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    if lost is not None:
        file = folder / "model.safetensors"
        kept = {name: weight for name, weight in load_file(file).items() if not name.startswith(lost)}
        save_file(kept, file, metadata={"format": "pt"})
    return str(folder)
