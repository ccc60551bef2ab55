"""Caption-image batches out of WebDataset shards: shuffled, dealt to ranks and workers, resumable at any batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from emf_lightning.data.cache.feature_cache import FeatureCache, pair_name
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.reading.caption_files import CaptionFiles
from emf_lightning.data.reading.decoding import (
    SquareTransform,
    UnusableSampleError,
    caption_of,
    image_of,
    picture_name,
    view_of,
)
from emf_lightning.data.reading.tar_samples import TarSample, read_samples
from emf_lightning.text.base import TextFeatures

CACHED = "in the caches already"
"""The reason for which a sample is left out where only missing ones are wanted."""


class Position(NamedTuple):
    """Where a lane stands: at the beginning of a block, and how many samples of the block's permutation are out."""

    turn: int = 0
    """How many of the lane's shards are behind."""
    offset: int = 0
    """Byte offset of the block's first sample in its shard."""
    number: int = 0
    """That sample's running number in the shard."""
    block: int = 0
    emitted: int = 0


class RawBatch:
    """B samples as they leave a worker, not yet encoded.

    Not a dataclass: Lightning's precision plugins and movers take dataclasses apart. What a cache had is here as it was
    stored, and what the others are made from is here only for the others, both in the order of the rows.

    Attributes:
        captions: the B captions.
        pictures: the B images' names; empty where nothing is kept or made by them.
        images: ``[rows without latents, 3, H, W]``, uint8.
        latents: ``[rows with latents, C, h, w]``, None if there are none.
        latents_found: ``[B]``, bool, True where the latent cache had the picture.
        views: ``[rows without features, 3, S, S]``, uint8, where features are made from the image, too; else None.
        features: of the rows that the feature cache had, None if there are none.
        found: ``[B]``, bool, True where the feature cache had the caption, or the caption with this image.
        lane: which of the rank's lanes it comes from.
        position: of the lane behind this batch.
        skipped: reason -> samples left out since the lane's last batch.
        examples: reason -> where the first of them stood.
        ticket: its number among the batches that the loader has handed out.
    """

    def __init__(
        self,
        samples: Sequence[_Sample],
        stream: ShardStream,
        *,
        lane: int,
        position: Position,
        skipped: dict[str, int],
        examples: dict[str, str],
    ) -> None:
        self.captions = tuple(sample.caption for sample in samples)
        self.pictures = tuple(sample.picture for sample in samples)
        self.images = _stack([sample.pixels for sample in samples], stream.transform.side)
        entries = [sample.latents for sample in samples]
        self.latents_found = torch.tensor([entry is not None for entry in entries], dtype=torch.bool)
        kept = [entry for entry in entries if entry is not None]
        self.latents = stream.latents.unpack(kept) if stream.latents is not None and kept else None
        side = stream.view_side
        self.views = None if side is None else _stack([sample.view for sample in samples], side)
        entries = [sample.features for sample in samples]
        self.found = torch.tensor([entry is not None for entry in entries], dtype=torch.bool)
        kept = [entry for entry in entries if entry is not None]
        self.features = stream.features.unpack(kept) if stream.features is not None and kept else None
        self.lane, self.position, self.skipped, self.examples = lane, position, skipped, examples
        self.ticket = 0

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RawBatch:
        """This batch, its tensors on ``device``."""
        self.images = self.images.to(device, non_blocking=non_blocking)
        if self.latents is not None:
            self.latents = self.latents.to(device, non_blocking=non_blocking)
        if self.views is not None:
            self.views = self.views.to(device, non_blocking=non_blocking)
        if self.features is not None:
            context = self.features.context.to(device, non_blocking=non_blocking)
            self.features = TextFeatures(context, self.features.mask.to(device))
        return self

    def pin_memory(self) -> RawBatch:
        """This batch, its images and features in page-locked memory."""
        self.images = self.images.pin_memory()
        if self.features is not None:
            self.features = TextFeatures(self.features.context.pin_memory(), self.features.mask)
        return self


class _Sample(NamedTuple):
    """A sample that will be used: what the caches had of it, and what the rest is made from."""

    caption: str
    picture: str
    pixels: NDArray[np.uint8] | None
    view: NDArray[np.uint8] | None
    latents: bytes | None
    features: bytes | None


def _stack(images: Sequence[NDArray[np.uint8] | None], side: int) -> Tensor:
    """``[n, 3, side, side]`` of the n images that are there."""
    there = [image for image in images if image is not None]
    stacked = torch.from_numpy(np.stack(there)) if there else torch.empty(0, side, side, 3, dtype=torch.uint8)
    return stacked.permute(0, 3, 1, 2).contiguous()


class ShardStream(IterableDataset[RawBatch]):
    """One rank's batches of one pass over the shards.

    A pass is dealt to ``ranks * lanes`` lanes (a lane is what one worker reads): whole shards, in the order of the
    pass, as many as divide evenly; the samples of the remaining shards one by one. So every sample is in exactly one
    lane, however few shards there are. A lane is shuffled in blocks of ``shuffle_block`` samples, each held in memory
    and permuted by (seed, pass, lane, block): a resumed lane reads again no more than the block it stood in.

    Read with the standard library, because neither common reader keeps the promises above. ``datasets`` 5.2, streaming:
    a shard that is cut off ends the run (``tarfile.ReadError``); JSON members that Arrow cannot type, like GenEval's
    ``["left of", 0]``, cannot be opened at all; a resume replays the shard from its start, and loses what was in the
    shuffle buffer, so that other samples follow; a third of the speed here (2,400 against 8,900 decoded 36 px samples
    a second on one core). ``webdataset`` 1.0 has no state to resume from.

    Args:
        shards: files or addresses, in a fixed order.
        transform: makes images square; a number stands for the plain one of that side.
        batch_size: samples a batch.
        shuffle_block: samples a block; 1 shuffles the shards only, 0 nothing.
        seed: of the shuffle.
        rank, ranks: of the distributed run.
        lanes: streams in this rank; the number of workers, 1 without.
        drop_last: leaves out a lane's last batch where it is smaller.
        flip: mirrors half of the images; captions with "left" and "right" then lie.
        limit: reads the first ``limit`` samples only, all dealt one by one.
        features: a feature cache that is open; None leaves all captions to the encoder.
        latents: a latent cache that is open; None leaves all images to the autoencoder.
        view_side: side of the pictures from which features are made, too (``TextEncoder.view_side``).
        only_missing: leaves out samples that the caches hold, and decodes nothing but what they lack: to fill them.
        captions: from files beside the shards; they come before those in the shards.
        pictures: whether images are wanted; without, samples need none.
    """

    def __init__(
        self,
        shards: Sequence[str],
        transform: SquareTransform | int,
        batch_size: int,
        *,
        shuffle_block: int = 0,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        lanes: int = 1,
        drop_last: bool = False,
        flip: bool = False,
        limit: int | None = None,
        features: FeatureCache | None = None,
        latents: LatentCache | None = None,
        view_side: int | None = None,
        only_missing: bool = False,
        captions: CaptionFiles | None = None,
        pictures: bool = True,
    ) -> None:
        self.shards = tuple(shards)
        self.transform = SquareTransform(transform) if isinstance(transform, int) else transform
        self.batch_size = batch_size
        self.shuffle_block = shuffle_block
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.lanes = lanes
        self.drop_last = drop_last
        self.flip = flip
        self.limit = limit
        self.features = features
        self.latents = latents
        self.view_side = view_side
        self.only_missing = only_missing
        self.captions = captions
        self.pictures = pictures
        self.start(0, [Position()] * lanes, 0)

    def start(self, epoch: int, positions: Sequence[Position], first: int) -> None:
        """Sets where the next iteration begins: the pass, each lane's position, and the lane of the first batch."""
        self._epoch, self._positions, self._first = epoch, tuple(positions), first

    def turns(self, epoch: int, lane: int) -> list[tuple[str, int, int]]:
        """The lane's shards of one pass, in order, as (path, part, parts): of each, one part of its samples."""
        order: Sequence[int] = range(len(self.shards))
        if self.shuffle_block > 0:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards)).tolist()
        streams, stream = self.ranks * self.lanes, self.rank * self.lanes + lane
        whole = 0 if self.limit is not None else len(order) // streams * streams
        turns = [(self.shards[i], 0, 1) for i in order[stream:whole:streams]]
        return turns + [(self.shards[i], stream, streams) for i in order[whole:]]

    def __iter__(self) -> Iterator[RawBatch]:
        """The batches of this process's lane; the last one is empty and carries what was skipped since the last."""
        worker = get_worker_info()
        lane = (self._first + (worker.id if worker else 0)) % self.lanes
        samples: list[_Sample] = []
        skipped: Counter[str] = Counter()
        examples: dict[str, str] = {}

        def batch(position: Position) -> RawBatch:
            made = RawBatch(samples, self, lane=lane, position=position, skipped=dict(skipped), examples=dict(examples))
            for collected in (samples, skipped, examples):
                collected.clear()
            return made

        position = start = self._positions[lane]
        for position, sample, flipped in self._samples(lane, start):
            try:
                samples.append(self._taken(sample, flipped))
            except UnusableSampleError as reason:
                skipped[str(reason)] += 1
                if str(reason) != CACHED:
                    examples.setdefault(str(reason), sample.where)
                continue
            if len(samples) == self.batch_size:
                yield batch(position)
        if self.drop_last:
            samples.clear()
        if samples:
            yield batch(position)
        yield batch(position)

    def _taken(self, sample: TarSample, flipped: bool) -> _Sample:
        """What is needed of ``sample``: its image is decoded only for what the caches do not have.

        Raises:
            UnusableSampleError: for a sample that is left out.
        """
        if sample.fault is not None:
            raise UnusableSampleError(sample.fault)
        caption = self.captions.of(sample.where) if self.captions is not None else None
        caption = caption or caption_of(sample)
        pairs = self.view_side is not None
        named = self.latents is not None or (pairs and self.features is not None)
        picture = picture_name(sample, flipped) if named else ""
        key = pair_name(caption, picture) if pairs else caption
        if self.only_missing and self._is_cached(key, picture):
            raise UnusableSampleError(CACHED)
        latents = self.latents.fetch(picture) if self.latents is not None else None
        features = self.features.fetch(key) if self.features is not None else None
        needs_pixels = self.pictures and latents is None and not (self.only_missing and self.latents is None)
        needs_view = pairs and features is None and not (self.only_missing and self.features is None)
        pixels = view = None
        if needs_pixels or needs_view:
            image = image_of(sample)
            pixels = _turned(self.transform(image), flipped) if needs_pixels else None
            view = _turned(view_of(image, self.view_side or 0), flipped) if needs_view else None
        return _Sample(caption, picture, pixels, view, latents, features)

    def _is_cached(self, key: str, picture: str) -> bool:
        features = self.features is None or self.features.holds(key)
        return features and (self.latents is None or self.latents.holds(picture))

    def _samples(self, lane: int, position: Position) -> Iterator[tuple[Position, TarSample, bool]]:
        """The lane's samples from ``position`` on, each with the position behind it and whether it is mirrored."""
        size = max(self.shuffle_block, 1)
        source = self._read(lane, position)
        if self.limit is not None:
            source = islice(source, len(range(self.rank * self.lanes + lane, self.limit, self.ranks * self.lanes)))
        start = position
        while True:
            block = list(islice(source, size))
            if not block:
                return
            rng = np.random.default_rng([self.seed, self._epoch, self.rank * self.lanes + lane, start.block])
            order = rng.permutation(len(block)) if self.shuffle_block > 1 else range(len(block))
            flips = rng.random(len(block)) < 0.5 if self.flip else np.zeros(len(block), bool)
            for emitted in range(start.emitted, len(block)):
                at = int(order[emitted])
                yield start._replace(emitted=emitted + 1), block[at][1], bool(flips[at])
            start = block[-1][0]._replace(block=start.block + 1, emitted=0)

    def _read(self, lane: int, position: Position) -> Iterator[tuple[Position, TarSample]]:
        """The lane's undecoded samples in the order of the shards, from the block's start in ``position`` on."""
        offset, number = position.offset, position.number
        turns = list(enumerate(self.turns(self._epoch, lane)))
        for turn, (path, part, parts) in turns[position.turn :]:
            for sample in read_samples(path, offset, number, part, parts):
                yield position._replace(turn=turn, offset=sample.end, number=sample.number + 1), sample
            offset = number = 0


def _turned(image: NDArray[np.uint8], flipped: bool) -> NDArray[np.uint8]:
    return image[:, ::-1] if flipped else image
