"""Caption-image pairs with a similarity of any two images, for the retrieval of an encoder study."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from emf_lightning.evaluation.devices import device_of
from emf_lightning.evaluation.folders.image_files import read_image
from emf_lightning.pretrained.loading import load_pretrained, unreadable


class PairCorpus(ABC):
    """N caption-image pairs.

    Attributes:
        name: name in reports.
        owners: ``[N]``, number of each pair's image; pairs of one image have the same number.
        exhaustive: whether the similarity to all images is cheap, so that chance and the best possible are computed.
        matches_paper: whether EMF's Table 1 (arXiv 2604.18168) uses these pairs.
    """

    name: str
    captions: Sequence[str]
    owners: NDArray[np.int64]
    exhaustive: bool
    matches_paper: bool = False

    @abstractmethod
    def similarity(self, query: int, others: NDArray[np.int64]) -> NDArray[np.float64]:
        """Similarity of the image of pair ``query`` to those of ``others`` ``[K]``, ``[K]``; 1 for equal images."""

    @abstractmethod
    def image(self, pair: int) -> NDArray[np.uint8]:
        """The image of a pair, ``[H, W, 3]``, 8-bit RGB."""


class CocoPairs(PairCorpus):
    """COCO captions 2017 on disk, one caption an image; image similarity is the cosine of DINOv3's pooled features.

    Args:
        root: folder with ``train2017/`` and ``annotations/captions_train2017.json``.
        dinov3: hub name or local folder of a DINOv3 ViT in transformers' format.
        split: ``train2017`` or ``val2017``.
        caption: number of the caption among those of its image, in the order of their ids.
        limit: number of pairs; all by default.
        device: ``cuda``, ``cpu``; by default the process's own GPU where there is one.

    Raises:
        ValueError: for missing files or weights.
    """

    exhaustive = False

    def __init__(
        self,
        root: Path,
        dinov3: str,
        split: str = "train2017",
        caption: int = 0,
        limit: int | None = None,
        device: str | None = None,
    ) -> None:
        file = Path(root) / "annotations" / f"captions_{split}.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            names = {image["id"]: image["file_name"] for image in content["images"]}
            of_image: dict[int, list[tuple[int, str]]] = {}
            for row in content["annotations"]:
                of_image.setdefault(row["image_id"], []).append((row["id"], row["caption"].strip()))
        except OSError as error:
            raise ValueError(f"CocoPairs: cannot read {file} ({error.strerror}); root is COCO's folder") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"CocoPairs: {file} is no COCO caption file ({error})") from error
        chosen = [n for n in sorted(names) if len(of_image.get(n, ())) > caption][:limit]
        kept = [(n, sorted(of_image[n])[caption][1]) for n in chosen]
        if len(kept) < 2:
            raise ValueError(f"CocoPairs: {file} has fewer than two images with {caption + 1} captions")
        self._paths = [Path(root) / split / names[number] for number, _ in kept]
        if absent := next((path for path in self._paths if not path.is_file()), None):
            raise ValueError(f"CocoPairs: no image {absent}; unpack {split}.zip into {root}")
        self.name = f"COCO {split}, {len(kept):,} pairs, caption {caption}, {Path(dinov3).name}"
        self.matches_paper = split == "train2017" and limit is None
        self.captions = [text for _, text in kept]
        self.owners = np.array([number for number, _ in kept])
        self._embed = Dinov3(dinov3, device)
        self._vectors: dict[int, NDArray[np.float64]] = {}

    def similarity(self, query: int, others: NDArray[np.int64]) -> NDArray[np.float64]:
        for pair in {int(query), *others.tolist()}.difference(self._vectors):
            self._vectors[pair] = self._embed(self.image(pair))
        return np.stack([self._vectors[other] for other in others.tolist()]) @ self._vectors[int(query)]

    def image(self, pair: int) -> NDArray[np.uint8]:
        return read_image(self._paths[pair])


class Dinov3:
    """The pooled feature of a DINOv3 ViT, of unit length; ``model`` is a hub name or folder in transformers' format.

    Raises:
        ValueError: if the model cannot be loaded, or its weights are not all of a DINOv3 ViT's.
    """

    def __init__(self, model: str, device: str | None = None) -> None:
        from transformers import AutoImageProcessor, DINOv3ViTModel

        self.device = device_of(device)
        remedy = f"accept its licence and download it with `hf download {model}`, or give a local folder"
        network = load_pretrained("Dinov3", DINOv3ViTModel, model, frozen=True, argument="model", remedy=remedy)
        self.network = network.to(self.device)
        try:
            self.processor = AutoImageProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise unreadable("Dinov3", model, error, "the processor of model", remedy) from error

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.float64]:
        """``[D]``, of ``image`` ``[H, W, 3]``, 8-bit RGB."""
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        vector = self.network(pixel_values=pixels).pooler_output[0].double()
        return (vector / vector.norm()).cpu().numpy()
