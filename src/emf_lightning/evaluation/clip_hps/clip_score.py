"""CLIP score and HPS v2.1: cosines between a CLIP model's features of image and prompt."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emf_lightning.evaluation.clip_hps.clip_model import load_clip
from emf_lightning.evaluation.image_metric import ImageMetric, PromptMeans
from emf_lightning.text.fingerprint import fingerprint

HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The four styles of HPS's benchmark, in the order of published tables."""

CLUSTERS = 2**16
"""Clusters of prompts over which a CLIP score sums its images."""


class ClipScore(ImageMetric):
    """100 times the cosine between OpenCLIP's features of image and prompt, averaged over images; not clipped at 0.

    Published numbers differ by the model: papers on InstaFlow and GANs use ViT-g-14, others ViT-L-14. ``se`` is the
    standard error of a mean over clusters, because images of one prompt resemble each other. A cluster is the prompts
    of one checksum modulo 2^16: ``se`` stays valid where prompts share one, and the state has 1 MB for any number of
    prompts.

    Args:
        model: OpenCLIP's name of the architecture.
        pretrained: path of its weights, or a tag of OpenCLIP's.
        device: ``cuda``, ``cpu``; by default the process's own GPU where there is one.
        quick_gelu: see ``ClipColours``.
    """

    totals: Tensor
    images: Tensor

    def __init__(
        self,
        model: str = "ViT-L-14-quickgelu",
        pretrained: str = "openai",
        device: str | None = None,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        self.name = "clip" if model == "ViT-L-14-quickgelu" else f"clip_{model}"
        self.title = f"CLIP score ({model})"
        self._clip = load_clip("ClipScore", model, pretrained, quick_gelu, device)
        self.add_sum("totals", CLUSTERS)
        self.add_sum("images", CLUSTERS, dtype=torch.int64)

    def update(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> None:
        from PIL import Image

        pixels = torch.stack([self._clip.transform(Image.fromarray(image)) for image in images])
        values = 100 * self._clip.cosines(pixels, prompts).to(self.totals.device)
        self.rows = [{"prompt": p, "clip": round(v, 4)} for p, v in zip(prompts, values.tolist(), strict=True)]
        clusters = torch.tensor([zlib.crc32(prompt.encode()) % CLUSTERS for prompt in prompts], device=values.device)
        self.totals.index_add_(0, clusters, values)
        self.images.index_add_(0, clusters, torch.ones_like(clusters))

    def compute(self) -> dict[str, Tensor]:
        present = self.images > 0
        totals, images, clusters = self.totals[present], self.images[present], present.sum()
        mean = totals.sum() / images.sum()
        deviation = (totals - mean * images).square().sum().sqrt() / images.sum()
        return {"score": mean, "se": deviation * (clusters / (clusters - 1)).sqrt()}  # NaN for a single prompt

    def settings(self) -> dict[str, Any]:
        return self._clip.settings


class HpsScore(PromptMeans):
    """HPS v2.1 (arXiv 2306.09341): 100 times the cosine of a ViT-H-14 trained on people's preferences.

    ``score`` is the mean over all prompts of the benchmark; ``compute`` also returns the mean of each style. A repeated
    prompt counts as often as it is listed. A folder may have the benchmark's layout, ``photo/00012.jpg``.

    Args:
        weights: path of ``HPS_v2.1_compressed.pt``; v2.0 gives other numbers.
        benchmark: folder with the prompts, ``anime.json``, ``concept-art.json``, ``paintings.json``, ``photo.json``.
        antialias: of the bicubic resize. False reproduces torchvision at the time of the published scores; True, the
            default today, gives about two points less for SDXL.
        device: see ``ClipScore``.
        model: OpenCLIP's name of the architecture.

    Raises:
        ValueError: for missing or malformed weights or prompts.
    """

    def __init__(
        self,
        weights: Path,
        benchmark: Path,
        antialias: bool = False,
        device: str | None = None,
        model: str = "ViT-H-14",
    ) -> None:
        styles = {style: _prompts_of(benchmark / f"{style}.json") for style in HPS_STYLES}
        places = [(text, style) for style in HPS_STYLES for text in styles[style]]
        super().__init__([text for text, _ in places], [style for _, style in places], scale=100.0)
        self._styles = styles
        self.name, self.title = "hps", "HPS v2.1"
        self.antialias = antialias
        self._clip = load_clip("HpsScore", model, str(weights), device=device)

    def prompt_of(self, path: PurePath) -> str | None:
        texts = self._styles.get(path.parts[0], []) if len(path.parts) == 2 else []
        return texts[int(path.stem)] if path.stem.isdigit() and int(path.stem) < len(texts) else None

    def values(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> list[float]:
        visual = self._clip.model.visual
        pixels = torch.stack([fit_to_square(image, visual.image_size[0], self.antialias) for image in images])
        mean, std = (torch.tensor(visual.preprocess_cfg[name])[:, None, None] for name in ("mean", "std"))
        return self._clip.cosines((pixels - mean) / std, prompts).tolist()

    def settings(self) -> dict[str, Any]:
        prompts = {"prompts": len(self._places), "benchmark": fingerprint(prompts=self._styles)[:12]}
        return {**self._clip.settings, "antialias": self.antialias, **prompts}


def fit_to_square(image: NDArray[np.uint8], size: int, antialias: bool) -> Tensor:
    """``image`` ``[H, W, 3]`` as ``[3, size, size]`` in [0, 1]: longer side scaled to ``size``, black padding."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] / 255
    height, width = image.shape[:2]
    scale = size / max(height, width)
    shape = (round(height * scale), round(width * scale))
    if shape != (height, width):
        pixels = nn.functional.interpolate(pixels, shape, mode="bicubic", align_corners=False, antialias=antialias)
    above, left = (size - shape[0]) // 2, (size - shape[1]) // 2
    return nn.functional.pad(pixels[0], (left, size - shape[1] - left, above, size - shape[0] - above))


def _prompts_of(path: Path) -> list[str]:
    """The list of prompts in a JSON file of HPS's benchmark."""
    try:
        texts = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"HpsScore: cannot read {str(path)!r} ({error.strerror}); give the benchmark folder of HPDv2, with "
            f"{', '.join(f'{style}.json' for style in HPS_STYLES)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"HpsScore: {str(path)!r} is no JSON ({error})") from error
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"HpsScore: {str(path)!r} must be a list of prompts")
    return texts
