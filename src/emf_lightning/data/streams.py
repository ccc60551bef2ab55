"""Caption-image batches out of WebDataset shards: shuffled, dealt to ranks and workers, resumable at any batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from emf_lightning.data.decoding import UnusableSampleError, caption_of, pixels_of
from emf_lightning.data.tar_samples import TarSample, read_samples
from emf_lightning.text.base import TextFeatures


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

    Not a dataclass: Lightning's precision plugins and movers take dataclasses apart.

    Attributes:
        images: ``[B, 3, H, W]``, uint8.
        captions: the B captions.
        found: ``[B]``, bool, True where the feature cache had the caption.
        features: the rows that were found, None if there are none.
        lane: which of the rank's lanes it comes from.
        position: of the lane behind this batch.
        skipped: reason -> samples left out since the lane's last batch.
        examples: reason -> where the first of them stood.
        ticket: its number among the batches that the loader has handed out.
    """

    def __init__(
        self,
        images: Tensor,
        captions: tuple[str, ...],
        found: Tensor,
        features: TextFeatures | None,
        *,
        lane: int,
        position: Position,
        skipped: dict[str, int],
        examples: dict[str, str],
    ) -> None:
        self.images, self.captions, self.found, self.features = images, captions, found, features
        self.lane, self.position, self.skipped, self.examples = lane, position, skipped, examples
        self.ticket = 0

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RawBatch:
        """This batch, its tensors on ``device``."""
        self.images = self.images.to(device, non_blocking=non_blocking)
        if self.features is not None:
            self.features = self.features.to(device)
        return self

    def pin_memory(self) -> RawBatch:
        """This batch, its images in page-locked memory."""
        self.images = self.images.pin_memory()
        return self


_NO_PICTURE = np.zeros((1, 1, 3), np.uint8)


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
        resolution: side of the square images.
        batch_size: samples a batch.
        shuffle_block: samples a block; 1 shuffles the shards only, 0 nothing.
        seed: of the shuffle.
        rank, ranks: of the distributed run.
        lanes: streams in this rank; the number of workers, 1 without.
        drop_last: leaves out a lane's last batch where it is smaller.
        flip: mirrors half of the images; captions with "left" and "right" then lie.
        limit: reads the first ``limit`` samples only, all dealt one by one.
        lookup: the feature cache's; None leaves all captions to the encoder.
        pictures: whether they are decoded; without, samples need none, and each comes with one black pixel.
    """

    def __init__(
        self,
        shards: Sequence[str],
        resolution: int,
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
        lookup: Callable[[Sequence[str]], Sequence[TextFeatures | None]] | None = None,
        pictures: bool = True,
    ) -> None:
        self.shards = tuple(shards)
        self.resolution = resolution
        self.batch_size = batch_size
        self.shuffle_block = shuffle_block
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.lanes = lanes
        self.drop_last = drop_last
        self.flip = flip
        self.limit = limit
        self.lookup = lookup
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
        pixels: list[NDArray[np.uint8]] = []
        captions: list[str] = []
        skipped: Counter[str] = Counter()
        examples: dict[str, str] = {}

        def batch(position: Position) -> RawBatch:
            found, features = self._look_up(captions)
            side = self.resolution
            images = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, side, side, 3, dtype=torch.uint8)
            made = RawBatch(
                images.permute(0, 3, 1, 2).contiguous(),
                tuple(captions),
                found,
                features,
                lane=lane,
                position=position,
                skipped=dict(skipped),
                examples=dict(examples),
            )
            for collected in (pixels, captions, skipped, examples):
                collected.clear()
            return made

        position = start = self._positions[lane]
        for position, sample, flipped in self._samples(lane, start):
            try:
                if sample.fault is not None:
                    raise UnusableSampleError(sample.fault)
                caption = caption_of(sample)
                image = pixels_of(sample, self.resolution) if self.pictures else _NO_PICTURE
            except UnusableSampleError as reason:
                skipped[str(reason)] += 1
                examples.setdefault(str(reason), sample.where)
                continue
            captions.append(caption)
            pixels.append(image[:, ::-1] if flipped else image)
            if len(pixels) == self.batch_size:
                yield batch(position)
        if self.drop_last:
            pixels.clear()
            captions.clear()
        if pixels:
            yield batch(position)
        yield batch(position)

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

    def _look_up(self, captions: Sequence[str]) -> tuple[Tensor, TextFeatures | None]:
        if self.lookup is None or not captions:
            return torch.zeros(len(captions), dtype=torch.bool), None
        rows = self.lookup(captions)
        hits = [row for row in rows if row is not None]
        return torch.tensor([row is not None for row in rows]), TextFeatures.cat(hits) if hits else None
