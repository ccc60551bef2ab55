"""Mask2Former as GenEval's detector: transformers' network with mmdetection's pre- and post-processing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emf_lightning.evaluation.devices import device_of
from emf_lightning.evaluation.geneval.detector import CLASSES, ObjectDetector
from emf_lightning.evaluation.geneval.verdict import THRESHOLD, Detection
from emf_lightning.pretrained.loading import load_pretrained
from emf_lightning.text.fingerprint import weights_digest

SHORT_SIDE, LONG_SIDE = 800, 1333
"""Limits in pixels: the test pipeline scales an image until one of its sides reaches its limit."""
DIVISOR = 32
"""Both sides are padded with zeros to a multiple of this."""
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""Mean and standard deviation of ImageNet's pixels, 8-bit RGB."""
MAX_INSTANCES = 100
"""(query, class) pairs kept of an image, those of the highest class score."""

UNUSED = ("swin.layernorm.", "encoder.layernorm.", "criterion.")
"""Weights that do not affect the output: checkpoints may lack them."""


class Mask2FormerDetector(ObjectDetector):
    """Mask2Former with a Swin backbone on COCO's 80 things (arXiv 2112.01527), instances as mmdetection reports them.

    GenEval was published with mmdetection's Swin-S checkpoint
    ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth``: given the path of that file, its
    weights are converted. ``facebook/mask2former-swin-small-coco-instance`` is another training of the same
    architecture. transformers' own post-processing is not used: it resizes masks in another way and loses scores.

    Args:
        model: mmdetection's ``.pth``, or a folder or hub name in transformers' format.
        device: ``cuda``, ``cpu``; by default the process's own GPU where there is one.
        short_side: pixels of the shorter side of the network's input; published scores use 800.

    Raises:
        ValueError: if the weights cannot be loaded, are incomplete, or are for other classes.
    """

    def __init__(self, model: str, device: str | None = None, short_side: int = SHORT_SIDE) -> None:
        self.name = f"Mask2Former {Path(model).name}"
        self.device = device_of(device)
        self.short_side = short_side
        self.network = _load(model).to(self.device)

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self.network)[:12]

    def settings(self) -> dict[str, Any]:
        return {"detector": self.name, "detector_weights": self._digest, "short_side": self.short_side}

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8]) -> list[Detection]:
        inputs, resized = preprocess(torch.tensor(image, device=self.device), self.short_side)
        with torch.autocast(self.device.type, enabled=False):
            output = self.network(pixel_values=inputs)
        sizes = {"padded": inputs.shape[2:], "resized": resized, "original": image.shape[:2]}
        return instances(output.class_queries_logits[0].float(), output.masks_queries_logits[0].float(), **sizes)


def preprocess(pixels: Tensor, short_side: int = SHORT_SIDE) -> tuple[Tensor, tuple[int, int]]:
    """The network's input ``[1, 3, H', W']``, and the height and width of the image in it, without the padding.

    As in mmdetection's test pipeline: ``pixels`` ``[H, W, 3]``, 8-bit RGB, are scaled to ``short_side``, unless the
    longer side would exceed 1333, bilinear without antialiasing to 8-bit values, normalised, padded with zeros to the
    right and below.
    """
    height, width = pixels.shape[:2]
    scale = min(LONG_SIDE * short_side / SHORT_SIDE / max(height, width), short_side / min(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    image = _bilinear(pixels.permute(2, 0, 1)[None].float(), size).round()
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    padding = (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR)
    return nn.functional.pad((image - mean) / std, padding), size


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    padded: Sequence[int],
    resized: Sequence[int],
    original: Sequence[int],
) -> list[Detection]:
    """The instances of one image, best first, as in mmdetection's ``instance_postprocess``, above GenEval's threshold.

    The 100 (query, class) pairs of the highest class probability are kept. A pair's score is that probability times
    the mean probability of its mask's pixels; its box is that of the mask. Masks are resized as logits.

    Args:
        class_logits: ``[Q, 81]``, no object last.
        mask_logits: ``[Q, h, w]``.
        padded: height and width of the network's input.
        resized: height and width of the image in it.
        original: height and width of the original image.
    """
    scores = class_logits.softmax(-1)[:, :-1].flatten()
    scores, pairs = scores.topk(min(MAX_INSTANCES, len(scores)))
    kept = scores > THRESHOLD  # a mask's probability is at most 1
    scores, pairs = scores[kept], pairs[kept]
    queries, labels = pairs // (class_logits.shape[1] - 1), pairs % (class_logits.shape[1] - 1)
    found = []
    for score, query, label in zip(scores.tolist(), queries.tolist(), labels.tolist(), strict=True):
        logits = _bilinear(mask_logits[None, None, query], padded)[..., : resized[0], : resized[1]]
        logits = _bilinear(logits, original)[0, 0]
        mask = logits > 0
        score *= float((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        if score > THRESHOLD:
            found.append(Detection.of_mask(CLASSES[label], score, mask.cpu().numpy()))
    return sorted(found, key=lambda detection: -detection.score)


def _bilinear(images: Tensor, size: Sequence[int]) -> Tensor:
    return nn.functional.interpolate(images, tuple(size), mode="bilinear", align_corners=False)


def _load(model: str) -> Any:
    """The network; all of its weights must be in the checkpoint."""
    from transformers import Mask2FormerForUniversalSegmentation

    from emf_lightning.evaluation.geneval.mmdet_checkpoint import convert_checkpoint

    download = f"download it first with `hf download {model}`"
    arguments: dict[str, Any] = {
        "remedy": f"give mmdetection's .pth, a folder in transformers' format, or {download}",
        "argument": "model",
        "unused": UNUSED,
        "frozen": True,
    }
    if model.endswith(".pth"):
        arguments["config"], arguments["state_dict"] = convert_checkpoint(model)
    network = load_pretrained("Mask2FormerDetector", Mask2FormerForUniversalSegmentation, model, **arguments)
    if (labels := network.config.num_labels) != len(CLASSES):
        raise ValueError(
            f"Mask2FormerDetector: model={model!r} knows {labels} classes, not COCO's 80 things; take a coco-instance "
            "checkpoint"
        )
    return network
