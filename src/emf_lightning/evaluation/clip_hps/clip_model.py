"""OpenCLIP's two towers, loaded with an error that can be acted on."""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emf_lightning.text.fingerprint import weights_digest


@dataclass(frozen=True)
class ClipModel:
    """A frozen model of images and texts.

    Attributes:
        name: OpenCLIP's, of the architecture.
        pretrained: tag or file name of the weights.
        model: OpenCLIP's, in eval mode; ``encode_image`` and ``encode_text`` take ``normalize``.
        transform: from a PIL image to what the model is shown.
        tokenizer: from texts to what it reads.
    """

    name: str
    pretrained: str
    model: Any
    transform: Any
    tokenizer: Any

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What tells it from another: names, activation and a digest of the weights; plain values."""
        from open_clip.transformer import QuickGELU

        return {
            "model": self.name,
            "pretrained": self.pretrained,
            "quick_gelu": any(isinstance(module, QuickGELU) for module in self.model.modules()),
            "weights": weights_digest(self.model)[:12],
        }


def load_clip(asker: str, model: str, pretrained: str, quick_gelu: bool = False) -> ClipModel:
    """OpenCLIP's ``model`` with the weights ``pretrained``, a path or one of OpenCLIP's tags.

    OpenAI's weights need QuickGELU and give plausible, wrong features without it. It is there whatever the name of the
    architecture where the tag, or OpenAI's own file, a TorchScript archive, tells.

    Args:
        asker: what messages begin with.
        model: name of the architecture.
        pretrained: path or tag of the weights.
        quick_gelu: the activation is QuickGELU, which other files cannot say themselves.

    Raises:
        ValueError: where it cannot be loaded.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    script = _is_script(pretrained)
    tag = get_pretrained_cfg(model.replace("/", "-"), pretrained)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript archive")
            whole, _, transform = open_clip.create_model_and_transforms(
                model,
                pretrained=pretrained,
                force_quick_gelu=quick_gelu or script or tag.get("quick_gelu", False),
                weights_only=not script,  # such an archive is read without Python's pickle
            )
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # of many kinds: no such name, no such file, no network, other weights
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{asker}: cannot load model={model!r} with pretrained={pretrained!r} ({reason}); give a name of "
            "open_clip.list_models() and the path of its weights, or a tag while online"
        ) from error
    name = Path(pretrained).name
    return ClipModel(model, name, whole.eval().requires_grad_(False), transform, tokenizer)


def _is_script(path: str) -> bool:
    """Whether there is a TorchScript archive at ``path``."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
