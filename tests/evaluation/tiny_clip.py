"""An OpenCLIP model with random weights, small enough to be made here."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def save_tiny_clip(folder: Path, name: str = "emf-tiny-clip", quick_gelu: bool = False, seed: int = 0) -> str:
    """The checkpoint of a model that OpenCLIP knows as ``name`` from now on."""
    import open_clip

    config = {
        "embed_dim": 12,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 16, "head_width": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(seed)
    model = open_clip.create_model(name, pretrained_text=False)
    for parameter in model.parameters():
        parameter.data.mul_(5)  # far from the linear range: inputs must tell
    torch.save(model.state_dict(), folder / f"{name}.pt")
    return str(folder / f"{name}.pt")
