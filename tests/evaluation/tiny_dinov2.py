"""DINOv2 with random weights, small enough to be made here."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model


def save_tiny_dinov2(folder: Path, patch: int = 56) -> str:
    """The folder with a network in it, made for images of 112 px; its matrices are far from the linear range."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=2 * patch, patch_size=patch, mlp_ratio=2
    )
    network = Dinov2Model(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    network.save_pretrained(folder)
    return str(folder)
