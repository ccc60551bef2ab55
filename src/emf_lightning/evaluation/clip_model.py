"""OpenCLIP's two towers, loaded with an error that can be acted on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ClipModel:
    """A frozen model of images and texts.

    Attributes:
        model: OpenCLIP's, in eval mode; ``encode_image`` and ``encode_text`` take ``normalize``.
        transform: from a PIL image to what the model is shown.
        tokenizer: from texts to what it reads.
    """

    model: Any
    transform: Any
    tokenizer: Any


def load_clip(asker: str, model: str, pretrained: str) -> ClipModel:
    """OpenCLIP's ``model`` with the weights ``pretrained``, a path or one of OpenCLIP's tags.

    Raises:
        ValueError: where it cannot be loaded; the message begins with ``asker``.
    """
    import open_clip

    try:
        whole, _, transform = open_clip.create_model_and_transforms(model, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # of many kinds: no such name, no such file, no network, other weights
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{asker}: cannot load model={model!r} with pretrained={pretrained!r} ({reason}); give a name of "
            "open_clip.list_models() and the path of its weights, or a tag while online"
        ) from error
    return ClipModel(whole.eval().requires_grad_(False), transform, tokenizer)
