"""Caption-image shards as what a training step receives: latents, text features, and the null caption's features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.data.feature_cache import FeatureCache
from emf_lightning.data.loader import ShardLoader
from emf_lightning.data.prompt_list import PromptList
from emf_lightning.data.shard_paths import shard_paths
from emf_lightning.data.streams import RawBatch, ShardStream
from emf_lightning.latents.base import Autoencoder
from emf_lightning.text.base import NULL_CAPTION, TextEncoder, TextFeatures


class CaptionImageData(LightningDataModule):
    """Caption-image pairs from WebDataset shards, encoded on the training device.

    Workers decode and look captions up in the cache; only captions it does not have reach the text encoder. The place
    in the data is part of the checkpoint and exact at any batch; the encoder and the autoencoder never are.

    Args:
        text: the frozen text encoder.
        autoencoder: the frozen autoencoder.
        shards: training shards: files, folders, globs, ranges ``data-{000000..000012}.tar``, addresses, or a list.
        validation_shards: likewise; none, no validation.
        cache: of the text features; none encodes every caption anew.
        resolution: side of the square images; others are resized and cropped about their centre.
        batch_size: samples a batch, on each rank.
        num_workers: processes that read, on each rank.
        shuffle_block: samples shuffled among each other, held in memory by each worker; 1 shuffles shards only.
        seed: of the shuffle.
        validation_samples: how many, the same ones each time.
        flip: mirrors half of the training images; wrong where captions say "left" and "right".
        prompts: text file with one prompt a line, for prediction.
        pictures: whether pictures are decoded and encoded. FGM learns from captions alone, and without them its shards
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
        cache: FeatureCache | None = None,
        resolution: int = 36,
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
        self.cache = cache
        self.resolution = resolution
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
        if self.cache is not None:
            self.cache.open(self.text)
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
            self.resolution,
            self.batch_size,
            shuffle_block=shuffle_block,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            ranks=self.trainer.world_size if self.trainer else 1,
            lanes=max(num_workers, 1),
            drop_last=limit is None,
            flip=flip,
            limit=limit,
            lookup=self.cache.lookup if self.cache is not None else None,
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
        self._move(batch.images.device)
        if self.cache is not None and self.num_workers > 0:
            self.cache.hits += int(batch.found.sum())  # the worker that looked up counts for itself only
        if self.pictures:
            latents = self.autoencoder.encode(batch.images.to(torch.float32) / 127.5 - 1).float()
        else:
            shape = (len(batch), self.latent_channels, self.latent_size, self.latent_size)
            latents = torch.zeros(shape, device=batch.images.device)
        return CaptionImageBatch(latents, self._features_of(batch), self.null_features(), batch.captions)

    def _features_of(self, batch: RawBatch) -> TextFeatures:
        """The batch's features: what its worker found in the cache, and the rest encoded, each caption once."""
        if batch.features is not None and bool(batch.found.all()):
            return batch.features
        missing = [caption for caption, found in zip(batch.captions, batch.found.tolist(), strict=True) if not found]
        encoded = self.text_features(missing)
        if batch.features is None:
            return encoded
        # row i of the batch is the next one of the hits or of the misses
        order = torch.cat([batch.found.nonzero().flatten(), (~batch.found).nonzero().flatten()]).argsort()
        hits = batch.features.to(dtype=encoded.context.dtype)
        return TextFeatures.cat([hits, encoded])[order.to(encoded.context.device)]

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> TextFeatures:
        """Features of ``captions`` on the training device; through the cache, where there is one."""
        device = self._move()
        unique = list(dict.fromkeys(captions))
        features = self.cache.features(unique, self.text) if self.cache is not None else self.text(unique)
        rows = {caption: row for row, caption in enumerate(unique)}
        return features.to(device)[torch.tensor([rows[caption] for caption in captions], device=device)]

    def null_features(self) -> TextFeatures:
        """The null caption's features, one row, on the training device."""
        device = self._move()
        if self._null is None or self._null.context.device != device:
            with torch.inference_mode(False):  # what validation computes is kept for training
                self._null = self.text_features([NULL_CAPTION])
        return self._null

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """8-bit images ``[B, H, W, 3]`` of ``latents``, on their device."""
        self._move(latents.device)
        images = self.autoencoder.decode(latents.float())
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _move(self, device: torch.device | None = None) -> torch.device:
        """The device of the frozen parts, after they moved to ``device`` (default: the trainer's)."""
        if device is None:
            device = self.trainer.strategy.root_device if self.trainer else self._device or torch.device("cpu")
        if device != self._device:
            self.text.to(device)
            self.autoencoder.to(device)
            self._device = device
        return device

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
