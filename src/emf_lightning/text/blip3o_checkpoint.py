"""Published BLIP3o-NEXT checkpoint: five models in one folder, three of them for the conditioning."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emf_lightning.pretrained.files import config_of, shapes_of, tensors_of
from emf_lightning.pretrained.loading import on_meta_device, unreadable

LANGUAGE = ""
IMAGES = "model.vision_tower.vision_tower."
CONNECTOR = "model.diffusion_connector."
"""Name prefixes of the language model, the image tokenizer and the connector."""

OTHERS = (
    "model.sana.",  # the diffusion model, which SanaFlowMap loads
    "model.sana_vae.",  # the autoencoder
    f"{IMAGES}decoder.",  # from codes back to features
    f"{IMAGES}decode_task_layer.",
    f"{IMAGES}bottleneck.out_linear.",
    f"{IMAGES}scale_layer.",
    f"{IMAGES}encoder.head.",  # after the layer whose features are used
    f"{IMAGES}encoder.post_layernorm.",
)
"""Name prefixes of the parts that are not loaded."""

FIELDS = (
    "image_start_tag_id",
    "image_start_token_id",
    "scale_start_token_id",
    "num_image_tokens",
    "vocab_size",
    "hidden_size",
)
"""Required fields of ``config.json``."""

PUBLISHED_SHAPES = {
    f"{IMAGES}encoder.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
    f"{IMAGES}encoder.embeddings.position_embedding.weight": (729, 1152),
    **{f"{IMAGES}encoder.encoder.layers.{layer}.mlp.fc1.weight": (4304, 1152) for layer in range(27)},
    f"{IMAGES}bottleneck.in_linear.weight": (1536, 1152),
    f"{CONNECTOR}0.weight": (2304, 2048),
}
"""Published shapes of image tokenizer (SigLIP2 so400m) and connector, for planning without the file."""


class BLIP3oCheckpoint:
    """Configuration, tensor names, shapes and values of a checkpoint; for the arguments see ``BLIP3oNext``.

    On the meta device a checkpoint that is not local has the published shapes and no values. Raises ``ValueError`` if
    it is missing, is no BLIP3o-NEXT, or is not in safetensors.
    """

    def __init__(self, pretrained: str, revision: str | None = None) -> None:
        self.pretrained = pretrained
        self.config: dict[str, Any]
        self.planned = on_meta_device()
        if self.planned and not Path(pretrained).expanduser().is_dir():
            try:
                self.config = dict.fromkeys(FIELDS, 0) | config_of(pretrained)
            except OSError as error:
                raise self.fault(f"is not at hand, and of no published size ({error})") from error
            self.shapes = dict(PUBLISHED_SHAPES)
            return
        self.folder = _folder(pretrained, revision)
        try:
            self.config = json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise self.fault(f"has no readable config.json ({error})") from error
        if missing := [field for field in FIELDS if field not in self.config]:
            raise self.fault(f"is no BLIP3o-NEXT: its config.json does not say {', '.join(missing)}")
        try:
            self.shapes = shapes_of(str(self.folder))
        except (OSError, ValueError, KeyError) as error:
            raise self.fault(f"has no whole set of safetensors ({error})") from error

    def fault(self, what: str) -> ValueError:
        """An error about this checkpoint."""
        return ValueError(
            f"BLIP3oNext: {self.pretrained!r} {what}; give the hub name or folder of a published BLIP3o-NEXT, e.g. "
            "BLIP3o/BLIP3o-NEXT-SFT-3B"
        )

    def check(self, expected: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Checks for all ``expected`` tensors and no others, but for ``optional`` ones and parts that are not loaded.
        Raises ``ValueError`` with the names of missing or unknown tensors.
        """
        wanted, known = set(expected), set(optional)
        present = {name for name in self.shapes if not name.startswith(OTHERS)}
        if missing := sorted(wanted - known - present):
            raise self.fault(f"lacks {_some(missing)}")
        if surplus := sorted(present - wanted - known):
            raise self.fault(f"holds {_some(surplus)}, which no part of BLIP3o-NEXT is called")

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype) -> None:
        """Loads the tensors under ``prefix`` into ``module``, as ``dtype``; ValueError names one of another shape."""
        ours = module.state_dict()
        for name, tensor in ours.items():
            if (theirs := self.shapes[prefix + name]) != tuple(tensor.shape):
                raise self.fault(f"has {prefix + name} of shape {theirs}, not {tuple(tensor.shape)}")
        weights = tensors_of(str(self.folder), prefix, ours)
        module.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)


def _folder(pretrained: str, revision: str | None) -> Path:
    """The local folder; a name on the hub is downloaded first."""
    if (folder := Path(pretrained).expanduser()).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        return Path(snapshot_download(pretrained, revision=revision, allow_patterns=wanted))
    except (OSError, HFValidationError) as error:
        raise unreadable("BLIP3oNext", pretrained, error) from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
