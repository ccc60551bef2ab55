"""LightningDataModule from caption-image shards to latents, text features and null features."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from emf_lightning.data.batch_encoder import BatchEncoder
from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.cache.network_disk import check_one_machine
from emf_lightning.data.prompt_list import PromptList
from emf_lightning.data.reading.caption_files import CaptionFiles
from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.pixels import ImageLimits
from emf_lightning.data.reading.raw_batch import RawBatch
from emf_lightning.data.reading.sources import HubDataset, Source, open_sources
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.data.reading.tar_samples import MEMBER_MB
from emf_lightning.latents.base import Autoencoder
from emf_lightning.text.base import TextEncoder, TextFeatures
from emf_lightning.text.plain import prompt_texts


class CaptionImageData(LightningDataModule):
    """Caption-image pairs from WebDataset shards, encoded on the training device.

    Loader workers decode samples and look them up in the caches; the encoder and the autoencoder compute only what is
    not cached. The checkpoint holds the exact position in the data, but never the encoder or the autoencoder.

    Args:
        text: frozen text encoder.
        autoencoder: frozen autoencoder.
        shards: training samples, one of these or a list: tar shards (files, folders, globs, URLs, ranges
            ``data-{000000..000012}.tar``), parquet files, a folder of pictures with texts beside them or a
            ``metadata.jsonl``, a data set of the Hugging Face hub (``owner/name``, or name, split, subset, revision).
        validation_shards: likewise; null turns validation off, unless ``validation_share`` is set.
        validation_share: share of the samples of ``shards`` that is held out for validation, chosen by the digests of
            their names.
        caption_column: column or JSON key of the captions, where it is none of caption, prompt and text; it may hold
            lists of captions, of which each pass takes the next.
        image_column: column of the pictures in parquet files, where there are several.
        captions: JSON or JSON-lines files of captions by image name, for shards of images alone in the same folder or
            below, the format of ShareGPT-4o-Image and Echo-4o-Image.
        cache: of text features; null encodes every caption each time.
        latent_cache: of latents; null encodes every image each time.
        resolution: side of the square images; larger ones are resized and center-cropped.
        resize_filter: "bilinear" is the filter of BLIP3o-NEXT and EMF, Pillow's; "bicubic" is torch's, faster.
        batch_size: samples a batch and rank.
        num_workers: loader processes a rank.
        shuffle_block: samples that are shuffled together, held in memory by each worker; 1 shuffles shards only.
        seed: of the shuffle.
        validation_samples: number of validation samples, the same ones each time.
        flip: mirrors half of the training images; wrong if captions say "left" and "right".
        prompts: text file with one prompt a line, or a list of prompts, for prediction.
        sampling_captions: text file with one caption a line, or a list of captions, for objectives that draw samples
            from the network in training (``RefinedMeanFlow``, ``JointObjective``): no image has to exist. Each batch
            gets as many random ones; by default it takes its own captions.
        member_mb: megabytes above which a file in a shard is left out, unread.
        images: false decodes and encodes no images, for FGM, which learns from captions alone; shards then need
            captions only, and latents are zeros of the right shape.
        image_limits: bounds beyond which an image is left out and counted.

    Raises:
        ValueError: for arguments out of range; in ``setup``, for missing shards or prompts.

    Example:
        >>> from emf_lightning.latents.pixels import Pixels
        >>> from emf_lightning.text.words import WordEncoder
        >>> data = CaptionImageData(WordEncoder(width=16, length=8), Pixels(), "shards", num_workers=0, batch_size=4)
        >>> data.setup("fit")
        >>> data.text_features(["a photo of a red circle"]).context.shape
        torch.Size([1, 8, 16])
    """

    def __init__(
        self,
        text: TextEncoder,
        autoencoder: Autoencoder,
        shards: str | HubDataset | list[str | HubDataset],
        *,
        validation_shards: str | HubDataset | list[str | HubDataset] | None = None,
        validation_share: float = 0.0,
        caption_column: str | None = None,
        image_column: str | None = None,
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
        prompts: str | Path | list[str] | None = None,
        sampling_captions: str | Path | list[str] | None = None,
        member_mb: float = MEMBER_MB,
        images: bool = True,
        image_limits: ImageLimits = ImageLimits(),
    ) -> None:
        super().__init__()
        lowest = {
            "resolution": 1,
            "batch_size": 1,
            "num_workers": 0,
            "shuffle_block": 1,
            "seed": 0,
            "validation_samples": 1,
        }
        for name, low in lowest.items():
            if (value := locals()[name]) < low:
                raise ValueError(f"CaptionImageData: {name} must be at least {low}, got {value}")
        if resolution % autoencoder.downsampling:
            raise ValueError(
                f"CaptionImageData: resolution {resolution} is not a multiple of the autoencoder's downsampling"
                f" {autoencoder.downsampling}"
            )
        if not 0 <= validation_share < 1 or (validation_share and validation_shards is not None):
            raise ValueError(
                f"CaptionImageData: validation_share must lie in [0, 1), got {validation_share}, and be 0 beside "
                "validation_shards"
            )
        self._encoder = BatchEncoder(text, autoencoder, cache, latent_cache if images else None, resolution, images)
        self.text = text
        self.autoencoder = autoencoder
        self.shards = shards
        self.validation_shards = validation_shards
        self.validation_share = validation_share
        self.caption_column = caption_column
        self.image_column = image_column
        self.captions = captions
        self.cache = cache
        self.latent_cache = latent_cache if images else None  # without images there are no latents to keep
        self.resolution = resolution
        self.transform = SquareTransform(resolution, resize_filter)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.shuffle_block = shuffle_block
        self.seed = seed
        self.validation_samples = validation_samples
        self.flip = flip
        self.prompts = prompts
        self.sampling_captions = sampling_captions
        self.member_mb = member_mb
        self.images = images
        self.image_limits = image_limits
        self._train: ShardLoader | None = None
        self._validation: ShardLoader | None = None
        self._prompts: PromptList | None = None
        self._sampling: PromptList | None = None

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
        return self._encoder.latent_size

    def setup(self, stage: str) -> None:
        self.open_caches(self.trainer.num_nodes if self.trainer is not None else 1)
        if stage == "fit":
            options = {"shuffle_block": self.shuffle_block, "flip": self.flip, "drop_last": True}
            self._train = self._loader(self.training_sources, self.num_workers, share=self.validation_share, **options)
            _ = self.sampling_prompts  # read, or refused, before training starts
        if stage in ("validate", "test") and not self.validates:
            raise ValueError("CaptionImageData: validation_shards is not set; give the shards to validate on")
        if stage in ("fit", "validate", "test") and self.validates:
            # one worker is enough for few samples, and keeps their order
            workers = min(self.num_workers, 1)
            self._validation = self._loader(self.validation_sources, workers, **self._validation_options)
        if stage == "predict" and self.prompts is not None:
            self._prompts = PromptList(self.prompts)

    @cached_property
    def caption_files(self) -> CaptionFiles | None:
        """Captions from files beside the shards, if there are any."""
        return None if self.captions is None else CaptionFiles(self.captions, self.caption_column)

    @property
    def validates(self) -> bool:
        """Whether there are validation samples."""
        return self.validation_shards is not None or self.validation_share > 0

    @cached_property
    def training_sources(self) -> tuple[str | Source, ...]:
        """The sources of ``shards``; ValueError if they are missing or hold nothing to train on."""
        return self._sources("shards")

    @cached_property
    def validation_sources(self) -> tuple[str | Source, ...]:
        """The sources of the validation samples; with ``validation_share`` the training's own."""
        return self.training_sources if self.validation_share else self._sources("validation_shards")

    @property
    def _validation_options(self) -> dict[str, Any]:
        return {"limit": self.validation_samples, "share": self.validation_share, "held_out": self.validation_share > 0}

    def _sources(self, argument: str) -> tuple[str | Source, ...]:
        return open_sources(
            getattr(self, argument),
            f"CaptionImageData: {argument}",
            caption_column=self.caption_column,
            image_column=self.image_column,
            images=self.images,
            captioned=self.captions is not None,
        )

    def _loader(self, sources: Sequence[str | Source], num_workers: int, **options: Any) -> ShardLoader:
        training = not {"held_out", "limit"} & options.keys()
        rank, ranks = 0, 1
        if self.trainer:
            rank, ranks = self.trainer.global_rank, self.trainer.world_size
        elif training and dist.is_available() and dist.is_initialized():
            rank, ranks = dist.get_rank(), dist.get_world_size()
        stream = self.stream(
            sources,
            rank=rank,
            ranks=ranks,
            lanes=max(num_workers, 1),
            seed=self.seed,
            images=self.images,
            feature_cache=self.cache,
            latent_cache=self.latent_cache,
            **options,
        )
        own_loop = training and self.trainer is None
        pinned = torch.cuda.is_available()
        return ShardLoader(stream, num_workers=num_workers, pin_memory=pinned, acknowledges=own_loop)

    def validation_batches(self, images: bool = True) -> Iterator[RawBatch]:
        """The first ``validation_samples`` validation samples in order, on every rank all of them, past the caches.

        Args:
            images: whether to decode their images, ``[B, 3, resolution, resolution]``.

        Raises:
            ValueError: without validation samples, or where no sample can be used.
        """
        return iter(ShardLoader(self.validation_stream(images)))

    def validation_stream(self, images: bool = True) -> ShardStream:
        """The stream of ``validation_batches``."""
        if not self.validates:
            raise ValueError("CaptionImageData: validation_shards is not set; give shards of validation samples")
        return self.stream(self.validation_sources, seed=self.seed, images=images, **self._validation_options)

    def stream(self, shards: Sequence[str | Source], **options: Any) -> ShardStream:
        """A stream over ``shards`` with this module's transform, batch size and captions."""
        options |= {"encoder_image_size": self.text.image_size, "captions": self.caption_files}
        options |= {"member_mb": self.member_mb, "image_limits": self.image_limits}
        options |= {"caption_column": self.caption_column}
        return ShardStream(shards, self.transform, self.batch_size, **options)

    def open_caches(self, machines: int = 1) -> None:
        """Binds the caches to the frozen parts, and to images after the transform and within their limits.

        Images whose latents are cached are not opened, so that other limits must not find these latents.

        Raises:
            ValueError: where ``machines`` of them would write to a cache on a network disk.
        """
        for name, cache in {"cache": self.cache, "latent_cache": self.latent_cache}.items():
            if cache is not None:
                try:
                    check_one_machine(cache.path, machines)
                except ValueError as error:
                    raise ValueError(f"data.{name}.path: {error}") from None
        limits = "" if self.image_limits == ImageLimits() else f" {self.image_limits}"  # keys as before for the default
        self._encoder.open_caches(f"{self.transform}{limits}")

    def train_dataloader(self) -> ShardLoader:
        assert self._train is not None
        return self._train

    def val_dataloader(self) -> ShardLoader | list[Any]:
        return [] if self._validation is None else self._validation

    def test_dataloader(self) -> Any:
        """The validation samples; ``test`` differs from ``validate`` only in the callbacks' final scores."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[tuple[int, str]]:
        """Batches of (indices ``[B]``, prompts)."""
        if self._prompts is None:
            raise ValueError("CaptionImageData: prompts is not set; give a text file with one prompt a line")
        if self.trainer is not None and len(self._prompts) < (ranks := self.trainer.world_size):
            raise ValueError(
                f"prompts: {len(self._prompts)} leave some of {ranks} processes without one; sample with fewer: "
                "--trainer.devices 1 --trainer.num_nodes 1"
            )
        return DataLoader(self._prompts, batch_size=self.batch_size)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # with overfit_batches each pass begins at the same batch
        trained = self.trainer and self.trainer.training and not self.trainer.overfit_batches  # type: ignore[attr-defined]
        if isinstance(batch, RawBatch) and self._train is not None and trained:
            self._train.acknowledge(batch)
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Encodes a raw batch; returns any other batch unchanged."""
        if not isinstance(batch, RawBatch):
            return batch
        for cache, lookup in ((self.cache, batch.features), (self.latent_cache, batch.latents)):
            if cache is not None and self.num_workers > 0:
                cache.hits += int(lookup.found.sum())  # counts in a worker stay in its process
        self._encoder.device = batch.images.device
        encoded = self._encoder.encode(batch)
        sampling = self.sampling_prompts
        if sampling is None or not (self.trainer and self.trainer.training):
            return encoded
        # a function of rank, step and batch, so that a resumed run repeats the uninterrupted one
        position = (n % 2**63 for n in batch.position)  # an offset behind a shard's end is negative
        key = (self.trainer.global_rank, self.trainer.global_step, batch.lane, *position)
        chosen = np.random.default_rng([zlib.crc32("\n".join(encoded.captions).encode()), *key])
        captions = [sampling.prompts[i] for i in chosen.integers(len(sampling), size=len(encoded))]
        return replace(encoded, sampling=self.text_features(captions))

    @property
    def sampling_prompts(self) -> PromptList | None:
        """The captions of ``sampling_captions``; None without them."""
        if self._sampling is None and self.sampling_captions is not None:
            self._sampling = PromptList(self.sampling_captions, "CaptionImageData: sampling_captions")
        return self._sampling

    @property
    def encoder(self) -> BatchEncoder:
        """The frozen parts and their caches, on the trainer's device."""
        if self.trainer:
            self._encoder.device = self.trainer.strategy.root_device
        return self._encoder

    def text_features(self, captions: Sequence[str]) -> TextFeatures:
        """Features of ``captions`` on the training device; through the cache, if there is one."""
        return self.encoder.text_features(prompt_texts(captions, "captions"))

    def null_features(self) -> TextFeatures:
        """Features ``[1, L, D]`` of the null caption, on the training device."""
        return self.encoder.null_features()

    def forget_null(self) -> None:
        """Discards the stored null features: the encoder has changed."""
        self._encoder.forget_null()

    def decode(self, latents: Tensor) -> Tensor:
        """8-bit images ``[B, H, W, 3]`` of ``latents``, on their device."""
        self._encoder.device = latents.device
        return self._encoder.decode(latents)

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> training samples left out by this rank so far."""
        return dict(self._train.skipped) if self._train is not None else {}

    def state_dict(self) -> dict[str, Any]:
        return {} if self._train is None else {"train": self._train.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning restores the states of its loaders only in the middle of an epoch: between two epochs, the number
        # of the pass would be lost and the next epoch would repeat the order of the first
        if self._train is not None and "train" in state_dict:
            self._train.load_state_dict(state_dict["train"])
