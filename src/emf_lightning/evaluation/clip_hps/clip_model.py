"""Loading of OpenCLIP models, with errors that name the remedy."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emf_lightning.evaluation.devices import device_of
from emf_lightning.text.fingerprint import weights_digest
from emf_lightning.text.open_clip import literal


@dataclass(frozen=True)
class ClipModel:
    """A frozen OpenCLIP model, whose features are normalised and computed in fp32.

    Attributes:
        name: OpenCLIP's name of the architecture.
        pretrained: tag or file name of the weights.
        model: on ``device``, in eval mode; ``encode_image`` and ``encode_text`` take ``normalize``.
        transform: maps a PIL image to the model's input ``[3, H, W]``.
        tokenizer: maps texts to token ids.
    """

    name: str
    pretrained: str
    model: Any
    transform: Any
    tokenizer: Any
    device: torch.device

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Names, activation and a digest of the weights, which identify the model; plain values."""
        from open_clip.transformer import QuickGELU

        return {
            "model": self.name,
            "pretrained": self.pretrained,
            "quick_gelu": any(isinstance(module, QuickGELU) for module in self.model.modules()),
            "weights": weights_digest(self.model)[:12],
        }

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit vectors ``[B, D]`` of preprocessed images ``[B, 3, H, W]``."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model.encode_image(pixels.to(self.device), normalize=True)  # type: ignore[no-any-return]

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``[B, D]`` of texts."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self.model.encode_text(tokens, normalize=True)  # type: ignore[no-any-return]

    def cosines(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosines ``[B]`` of preprocessed images ``[B, 3, H, W]`` and their texts, fp64."""
        return (self.image_features(pixels) * self.text_features(texts)).sum(1).double()


def load_clip(
    caller: str, model: str, pretrained: str, quick_gelu: bool = False, device: str | None = None
) -> ClipModel:
    """OpenCLIP's ``model`` with the weights ``pretrained``, a path or one of OpenCLIP's tags.

    OpenAI's weights need QuickGELU; without it features are plausible and wrong. It is used for tags that ask for it
    and for OpenAI's own file, a TorchScript archive, whatever the name of the architecture.

    Other files do not tell their activation: ``quick_gelu`` asks for it. By default the device is ``device_of(None)``.

    Raises:
        ValueError: if the model cannot be loaded; the message begins with ``caller``.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    script = _is_script(pretrained)
    tag = get_pretrained_cfg(model.replace("/", "-"), pretrained)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript archive")
            network, _, transform = open_clip.create_model_and_transforms(
                model,
                pretrained=pretrained,
                force_quick_gelu=quick_gelu or script or tag.get("quick_gelu", False),
                weights_only=not script,  # reading a TorchScript archive does not unpickle
            )
        tokenizer = literal(open_clip.get_tokenizer(model))
    except Exception as error:  # many types: unknown name, missing file, no network, other weights
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{caller}: cannot load model={model!r} with pretrained={pretrained!r} ({reason}); give a name of "
            "open_clip.list_models() and the path of its weights, or a tag while online"
        ) from error
    network = network.to(device_of(device)).eval().requires_grad_(False)
    return ClipModel(model, Path(pretrained).name, network, transform, tokenizer, device_of(device))


def _is_script(path: str) -> bool:
    """True if the file at ``path`` is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
