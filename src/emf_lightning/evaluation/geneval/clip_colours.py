"""GenEval's colour classifier: zero-shot CLIP on the object on grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emf_lightning.data.geneval_prompts import BACKGROUND, PALETTE
from emf_lightning.evaluation.clip_hps.clip_model import load_clip
from emf_lightning.evaluation.geneval.verdict import Detection

TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")


class ClipColours:
    """Zero-shot colours: the object alone on #999, cropped to its box, against three captions for each of ten colours.

    Grey is not among the ten, and each object gets one of them.

    Args:
        model: OpenCLIP's model name; GenEval uses OpenAI's ViT-L/14.
        pretrained: path of the weights, OpenAI's ``ViT-L-14.pt`` or OpenCLIP's, or a tag of OpenCLIP's.
        device: see ``Mask2FormerDetector``.
        quick_gelu: use QuickGELU; needed for OpenAI's weights unless the model name, a tag or OpenAI's own file
            implies it.

    Raises:
        ValueError: if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = "ViT-L-14-quickgelu",
        pretrained: str = "openai",
        device: str | None = None,
        quick_gelu: bool = False,
    ) -> None:
        self.clip = load_clip("ClipColours", model, pretrained, quick_gelu, device)
        self._classifiers: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        """Everything that comparable colours must share: model, activation and a digest of the weights."""
        return {f"colours_{name}": value for name, value in self.clip.settings.items()}

    def __call__(self, image: NDArray[np.uint8], detections: Sequence[Detection], label: str) -> list[str]:
        """The colour of each of ``detections``, all of class ``label``, in ``image`` ``[H, W, 3]``, 8-bit RGB."""
        if not detections:
            return []
        crops = torch.stack([self.clip.transform(_masked_crop(image, detection)) for detection in detections])
        logits = self.clip.image_features(crops) @ self._classifier(label)
        return [list(PALETTE)[i] for i in logits.argmax(1).tolist()]

    def _classifier(self, label: str) -> Tensor:
        """Classifier weights ``[D, 10]``: for each colour the normalised mean of its captions' unit vectors."""
        if label not in self._classifiers:
            texts = [t.format(colour=colour, label=label) for colour in PALETTE for t in TEMPLATES]
            means = self.clip.text_features(texts).view(len(PALETTE), len(TEMPLATES), -1).mean(1)
            self._classifiers[label] = (means / means.norm(dim=1, keepdim=True)).T
        return self._classifiers[label]


def _masked_crop(image: NDArray[np.uint8], detection: Detection) -> Any:
    """The object of ``detection`` on GenEval's grey, cropped to its box, as a PIL image."""
    from PIL import Image

    pixels = np.where(detection.mask[..., None], image, np.array(BACKGROUND, np.uint8))
    x0, y0, x1, y1 = (round(edge) for edge in detection.box)
    return Image.fromarray(pixels[y0:y1, x0:x1])


def check_colours(classify: ClipColours) -> None:
    """Tests ``classify`` on a flat disc of each colour.

    Raises:
        ValueError: for fewer than six right answers of ten; chance is one.
    """
    fine = (np.arange(4 * 224) + 0.5) / 4 - 112  # 4 x 4 samples a pixel
    alpha = (fine**2 + fine[:, None] ** 2 <= 90**2).reshape(224, 4, 224, 4).mean((1, 3))[..., None]
    right = 0
    for colour, rgb in PALETTE.items():
        image = np.rint(alpha * rgb + (1 - alpha) * BACKGROUND).astype(np.uint8)
        disc = Detection("sports ball", 1.0, (22.0, 22.0, 202.0, 202.0), (image != BACKGROUND).any(-1))
        right += classify(image, [disc], "sports ball") == [colour]
    if right < 6:
        raise ValueError(
            f"ClipColours: of ten flat discs it names {right} colours right: its weights are broken or of another model"
        )
