"""Caption-image shards as what a training step receives: latents, text features, and the null caption's features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.data.cache.feature_cache import FeatureCache, pair_name
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.prompt_list import PromptList
from emf_lightning.data.reading.caption_files import CaptionFiles
from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.shard_paths import shard_paths
from emf_lightning.data.reading.streams import RawBatch, ShardStream
from emf_lightning.latents.base import Autoencoder
from emf_lightning.text.base import NULL_CAPTION, TextEncoder, TextFeatures

FrozenPart = TypeVar("FrozenPart", TextEncoder, Autoencoder)


class CaptionImageData(LightningDataModule):
    """Caption-image pairs from WebDataset shards, encoded on the training device.

    Workers decode and look captions up in the cache; only captions it does not have reach the text encoder. The place
    in the data is part of the checkpoint and exact at any batch; the encoder and the autoencoder never are.

    Args:
        text: the frozen text encoder.
        autoencoder: the frozen autoencoder.
        shards: training shards: files, folders, globs, ranges ``data-{000000..000012}.tar``, addresses, or a list.
        validation_shards: likewise; none, no validation.
        captions: JSON or JSON-lines files of captions by image, for shards that hold images alone, in the folders below
            theirs: as ShareGPT-4o-Image and Echo-4o-Image are published.
        cache: of the text features; none encodes every caption anew.
        latent_cache: of the latents; none encodes every image anew.
        resolution: side of the square images; others are resized and cropped about their centre.
        resize_filter: of that resizing; "bilinear" is what BLIP3o-NEXT and EMF train with.
        batch_size: samples a batch, on each rank.
        num_workers: processes that read, on each rank.
        shuffle_block: samples shuffled among each other, held in memory by each worker; 1 shuffles shards only.
        seed: of the shuffle.
        validation_samples: how many, the same ones each time.
        flip: mirrors half of the training images; wrong where captions say "left" and "right".
        prompts: text file with one prompt a line, for prediction.
        pictures: whether images are decoded and encoded. FGM learns from captions alone, and without them its shards
            need hold nothing else; latents are then zeros of the right shape.

    Raises:
        ValueError: for arguments out of range; in ``setup``, for shards or prompts that are not there.
    """

    def __init__(
        self,
        text: TextEncoder,
        autoencoder: Autoencoder,
        shards: str | list[str],
        *,
        validation_shards: str | list[str] | None = None,
        captions: str | list[str] | None = None,
        cache: FeatureCache | None = None,
        latent_cache: LatentCache | None = None,
        resolution: int = 36,
        resize_filter: Literal["bicubic", "bilinear"] = "bicubic",
        batch_size: int = 128,
        num_workers: int = 1,
        shuffle_block: int = 1024,
        seed: int = 0,
        validation_samples: int = 1024,
        flip: bool = False,
        prompts: str | Path | None = None,
        pictures: bool = True,
    ) -> None:
        super().__init__()
        lowest = {"resolution": 1, "batch_size": 1, "num_workers": 0, "shuffle_block": 1, "validation_samples": 1}
        for name, low in lowest.items():
            if (value := locals()[name]) < low:
                raise ValueError(f"CaptionImageData: {name} must be at least {low}, got {value}")
        if resolution % autoencoder.downsampling:
            raise ValueError(
                f"CaptionImageData: resolution {resolution} is not a multiple of the autoencoder's downsampling"
                f" {autoencoder.downsampling}"
            )
        self.text = text
        self.autoencoder = autoencoder
        self.shards = shards
        self.validation_shards = validation_shards
        self.captions = captions
        self.cache = cache
        self.latent_cache = latent_cache
        self.resolution = resolution
        self.transform = SquareTransform(resolution, resize_filter)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.shuffle_block = shuffle_block
        self.seed = seed
        self.validation_samples = validation_samples
        self.flip = flip
        self.prompts = prompts
        self.pictures = pictures
        self._train: ShardLoader | None = None
        self._validation: ShardLoader | None = None
        self._prompts: PromptList | None = None
        self._null: TextFeatures | None = None
        self._device: torch.device | None = None
        self._places: dict[int, torch.device | None] = {}

    # -- what the model must agree with ------------------------------------------------------------------------------

    @property
    def context_width(self) -> int:
        """D of the text features."""
        return self.text.width

    @property
    def context_length(self) -> int:
        """L of the text features."""
        return self.text.length

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.autoencoder.channels

    @property
    def latent_size(self) -> int:
        """H = W of the latents."""
        return self.resolution // self.autoencoder.downsampling

    # -- loaders -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self.open_caches()
        if stage == "fit":
            self._train = self._loader(self.shards, "shards", self.num_workers, self.shuffle_block, self.flip)
        if stage in ("validate", "test") and self.validation_shards is None:
            raise ValueError("CaptionImageData: validation_shards is not set; give the shards to validate on")
        if stage in ("fit", "validate", "test") and self.validation_shards is not None:
            # one worker is enough for so few samples, and keeps their order
            workers, samples = min(self.num_workers, 1), self.validation_samples
            self._validation = self._loader(self.validation_shards, "validation_shards", workers, limit=samples)
        if stage == "predict" and self.prompts is not None:
            self._prompts = PromptList(self.prompts)

    def open_caches(self) -> None:
        """Binds the caches to the encoder and the autoencoder."""
        if self.cache is not None:
            self.cache.open(self.text)
        if self.latent_cache is not None:
            self.latent_cache.open(self.autoencoder, self.latent_size, str(self.transform))

    @cached_property
    def caption_files(self) -> CaptionFiles | None:
        """The captions beside the shards, where there are some."""
        return None if self.captions is None else CaptionFiles(self.captions)

    def _loader(
        self,
        shards: str | list[str],
        argument: str,
        num_workers: int,
        shuffle_block: int = 0,
        flip: bool = False,
        limit: int | None = None,
    ) -> ShardLoader:
        stream = ShardStream(
            shard_paths(shards, f"CaptionImageData: {argument}"),
            self.transform,
            self.batch_size,
            shuffle_block=shuffle_block,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            ranks=self.trainer.world_size if self.trainer else 1,
            lanes=max(num_workers, 1),
            drop_last=limit is None,
            flip=flip,
            limit=limit,
            features=self.cache,
            latents=self.latent_cache,
            view_side=self.text.view_side,
            captions=self.caption_files,
            pictures=self.pictures,
        )
        return ShardLoader(stream, num_workers=num_workers, pin_memory=torch.cuda.is_available())

    def train_dataloader(self) -> ShardLoader:
        assert self._train is not None
        return self._train

    def val_dataloader(self) -> ShardLoader | list[Any]:
        return [] if self._validation is None else self._validation

    def test_dataloader(self) -> Any:
        """The validation samples: what ``test`` adds to ``validate`` are the callbacks' final scores."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[tuple[int, str]]:
        """Batches of (indices ``[B]``, prompts)."""
        if self._prompts is None:
            raise ValueError("CaptionImageData: prompts is not set; give a text file with one prompt a line")
        return DataLoader(self._prompts, batch_size=self.batch_size)

    # -- encoding ----------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, RawBatch) and self._train is not None and self.trainer and self.trainer.training:
            self._train.acknowledge(batch)
        return batch

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """A worker's batch, encoded; anything else as it is."""
        if not isinstance(batch, RawBatch):
            return batch
        self.move(batch.images.device)
        for cache, found in ((self.cache, batch.found), (self.latent_cache, batch.latents_found)):
            if cache is not None and self.num_workers > 0:
                cache.hits += int(found.sum())  # the worker that looked up counts for itself only
        return CaptionImageBatch(self.latents_of(batch), self.features_of(batch), self.null_features(), batch.captions)

    def latents_of(self, batch: RawBatch) -> Tensor:
        """The batch's latents: what its worker found in the cache, and the rest encoded."""
        if not self.pictures:
            shape = (len(batch), self.latent_channels, self.latent_size, self.latent_size)
            return torch.zeros(shape, device=batch.images.device)
        hits = None if batch.latents is None else batch.latents.float()
        if not len(batch.images) and hits is not None:
            return hits
        fresh = self.placed(self.autoencoder).encode(batch.images.to(torch.float32) / 127.5 - 1).float()
        if self.latent_cache is not None:
            fresh = self.latent_cache.keep(_left_over(batch.pictures, batch.latents_found), fresh)
        return fresh if hits is None else torch.cat([hits, fresh])[_order(batch.latents_found).to(fresh.device)]

    def features_of(self, batch: RawBatch) -> TextFeatures:
        """The batch's features: what its worker found in the cache, and the rest encoded."""
        hits = None if batch.features is None else batch.features.to(dtype=torch.float32)
        if hits is not None and bool(batch.found.all()):
            return hits
        missing = _left_over(batch.captions, batch.found)
        if batch.views is None:
            fresh = self.text_features(missing)
        else:
            fresh = self.placed(self.text).encode_pairs(missing, batch.views.to(torch.float32) / 127.5 - 1)
            if self.cache is not None:
                names = map(pair_name, missing, _left_over(batch.pictures, batch.found))
                fresh = self.cache.keep(list(names), fresh).to(batch.views.device)
        if hits is None:
            return fresh
        return TextFeatures.cat([hits, fresh])[_order(batch.found).to(fresh.context.device)]

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> TextFeatures:
        """Features of ``captions`` on the training device; through the cache, where there is one."""
        device = self.move()
        unique = list(dict.fromkeys(captions))
        features = self.cache.features(unique, self._encode) if self.cache is not None else self._encode(unique)
        rows = {caption: row for row, caption in enumerate(unique)}
        return features.to(device)[torch.tensor([rows[caption] for caption in captions], device=device)]

    def null_features(self) -> TextFeatures:
        """The null caption's features, one row, on the training device."""
        device = self.move()
        if self._null is None or self._null.context.device != device:
            with torch.inference_mode(False):  # what validation computes is kept for training
                self._null = self.text_features([NULL_CAPTION])
        return self._null

    def forget_null(self) -> None:
        """Lets the null caption be encoded again: the encoder is another one than it was."""
        self._null = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """8-bit images ``[B, H, W, 3]`` of ``latents``, on their device."""
        self.move(latents.device)
        images = self.placed(self.autoencoder).decode(latents.float())
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def move(self, device: torch.device | None = None) -> torch.device:
        """Where the frozen parts compute from now on: on ``device`` (default: the trainer's)."""
        if device is None:
            device = self.trainer.strategy.root_device if self.trainer else self._device or torch.device("cpu")
        self._device = device
        return device

    def placed(self, part: FrozenPart) -> FrozenPart:
        """``part``, moved where it computes: when it is needed, since what is cached may need no encoder at all."""
        if self._places.get(id(part)) != self._device:
            part.to(self._device)
            self._places[id(part)] = self._device
        return part

    def _encode(self, captions: Sequence[str]) -> TextFeatures:
        features: TextFeatures = self.placed(self.text)(captions)
        return features

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> training samples left out by this rank so far."""
        return dict(self._train.skipped) if self._train is not None else {}

    def state_dict(self) -> dict[str, Any]:
        return {} if self._train is None else {"train": self._train.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning restores its loaders' states too, but only in the middle of an epoch: between two, the pass's
        # number would be lost and the next epoch repeat the first one's order
        if self._train is not None and "train" in state_dict:
            self._train.load_state_dict(state_dict["train"])


def _left_over(row_names: Sequence[str], found: Tensor) -> list[str]:
    """The names of the rows that were not found."""
    return [name for name, hit in zip(row_names, found.tolist(), strict=True) if not hit]


def _order(found: Tensor) -> Tensor:
    """Which of [hits, misses] each row of the batch is: the next one of its kind."""
    return torch.cat([found.nonzero().flatten(), (~found).nonzero().flatten()]).argsort()
