"""Caption-image batches from WebDataset shards: shuffled, dealt to ranks and workers, resumable at any batch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property, partial
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.cache.lookup import Lookup
from emf_lightning.data.reading.caption_files import CaptionFiles
from emf_lightning.data.reading.decoding import (
    SquareTransform,
    UnusableSampleError,
    decode_caption,
    decode_captions,
    decode_image,
    image_key,
    stretch_to_square,
)
from emf_lightning.data.reading.picture_folders import PictureFolders
from emf_lightning.data.reading.pixels import ImageLimits
from emf_lightning.data.reading.raw_batch import ImageRows, Position, RawBatch
from emf_lightning.data.reading.sources import Source
from emf_lightning.data.reading.tar_samples import MEMBER_MB, TarSample, read_samples

if TYPE_CHECKING:
    from emf_lightning.data.reading.pixels import Picture


Pixels = NDArray[np.uint8] | None


class Query(NamedTuple):
    """A sample with a caption, not yet looked up; a key is None without its cache."""

    caption: str
    feature_key: str | None
    latent_key: str | None
    decode: Callable[[], Picture]
    flipped: bool
    location: str


CACHED = "in the caches already"
"""Reason for leaving out a sample when only missing ones are wanted."""


@dataclass(eq=False)
class ShardStream(IterableDataset[RawBatch]):
    """One rank's batches of one pass over the shards.

    A pass is dealt to ``ranks * lanes`` lanes; each worker reads one lane. As many shards as divide evenly are dealt
    whole, in the order of the pass. Of the rest each lane takes its samples from one shard or two; where there are
    fewer shards than lanes, from every shard, so that all lanes have as many. So every sample is in exactly one lane. A
    lane is shuffled in blocks of ``shuffle_block`` samples; each block is held in memory and permuted by (seed, pass,
    lane, block), so that a resumed lane reads at most one block again. See also ``cuts_first_block``.

    Shards are read with the standard library, because neither common reader can do all of this. In ``datasets`` 5.2,
    a truncated shard ends the run; JSON that Arrow cannot type, like GenEval's ``["left of", 0]``, cannot be opened; a
    resume replays the shard from its start and loses the shuffle buffer; and it is 3.7 times slower (2,400 against
    8,900 decoded 36 px samples a second on one core). ``webdataset`` 1.0 has no state to resume from.

    Arguments that are not listed: see ``CaptionImageData``.

    Args:
        shards: tar shards, as files or URLs, and other sources, in a fixed order.
        transform: makes images square.
        shuffle_block: samples a block; 1 shuffles shards only, 0 turns shuffling off.
        lanes: lanes of this rank: the number of workers, or 1 without workers.
        drop_last: leaves out a lane's last batch if it is smaller.
        limit: reads the first ``limit`` samples only, dealt one by one.
        feature_cache: an open cache of text features; None leaves all captions to the encoder.
        latent_cache: an open cache of latents; None leaves all images to the autoencoder.
        encoder_image_size: side of the text encoder's images (``TextEncoder.image_size``).
        only_missing: leaves out samples that the caches hold and decodes only what the caches lack, to fill them; each
            of several captions of an image is a sample.
        captions: captions from files beside the shards; they override those in the shards.
        images: False decodes no images for the autoencoder; samples then need none.
        image_limits: bounds beyond which an image is left out.
        caption_column: key of the captions in the samples' JSON; by default one of ``CAPTION_KEYS``.
        share: share of samples that is held out, chosen by the digests of their names.
        held_out: reads only the held-out samples, rather than only the others.
        whole_pass: pass whose first block is whole in any case, since an earlier version began it.
    """

    shards: Sequence[str | Source]
    transform: SquareTransform
    batch_size: int
    _: KW_ONLY
    shuffle_block: int = 0
    seed: int = 0
    rank: int = 0
    ranks: int = 1
    lanes: int = 1
    drop_last: bool = False
    flip: bool = False
    limit: int | None = None
    feature_cache: FeatureCache | None = None
    latent_cache: LatentCache | None = None
    encoder_image_size: int | None = None
    only_missing: bool = False
    captions: CaptionFiles | None = None
    images: bool = True
    image_limits: ImageLimits = ImageLimits()
    member_mb: float = MEMBER_MB
    caption_column: str | None = None
    share: float = 0.0
    held_out: bool = False
    whole_pass: int = -1

    def __post_init__(self) -> None:
        self.start(0, [Position()] * self.lanes, 0)

    def start(self, epoch: int, positions: Sequence[Position], first: int) -> None:
        """Sets the start of the next iteration: pass, position of each lane, and lane of the first batch."""
        self._epoch, self._positions, self._first = epoch, tuple(positions), first

    @cached_property
    def folders(self) -> frozenset[int]:
        """Numbers of the sources that are folders of pictures beside shards."""
        found = frozenset(i for i, source in enumerate(self.shards) if isinstance(source, PictureFolders))
        return found if self.limit is None and len(found) < len(self.shards) else frozenset()

    @property
    def splits_rest(self) -> bool:
        """Whether some shards are dealt whole and the rest to the lanes in turn, one or two for each."""
        lanes, shards = self.ranks * self.lanes, len(self.shards) - len(self.folders)
        return self.limit is None and shards > lanes and shards % lanes > 1

    @property
    def cuts_first_block(self) -> bool:
        """Whether the first block of each pass is of another size, by chance.

        Of a single source, samples come in the same order in each pass. The last batch, which is left out if it is
        incomplete, would be of the same samples for ever. ``whole_pass`` is an exception.
        """
        fixed = len(self.shards) == 1 and self.limit is None
        return fixed and self.drop_last and self.shuffle_block > 1 and self._epoch != self.whole_pass

    def lane_shards(self, epoch: int, lane: int) -> list[tuple[str | Source, int, int, int]]:
        """The lane's shards of one pass in order, as (path, part, parts, width), see ``read_samples``."""
        order: Sequence[int] = range(len(self.shards))
        if self.shuffle_block > 0:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards)).tolist()
        lanes, index = self.ranks * self.lanes, self.rank * self.lanes + lane
        shards = self._dealt([i for i in order if i not in self.folders], index, lanes)
        for i in sorted(self.folders):  # each lane at another place, so that batches mix them with the shards
            rng = np.random.default_rng([self.seed, epoch, index, i])
            place = int(rng.integers(len(shards) + 1)) if self.shuffle_block > 0 else 0
            shards.insert(place, (self.shards[i], index, lanes, 1))
        return shards

    def _dealt(self, order: Sequence[int], index: int, lanes: int) -> list[tuple[str | Source, int, int, int]]:
        whole = 0 if self.limit is not None else len(order) // lanes * lanes
        shards = [(self.shards[i], 0, 1, 1) for i in order[index:whole:lanes]]
        rest = order[whole:]
        if not self.splits_rest:
            # validation begins with another lane in each shard: the first lane takes what is left over
            shift = self.limit is not None
            return shards + [(self.shards[i], (index - n * shift) % lanes, lanes, 1) for n, i in enumerate(rest)]
        # the samples of the rest are len(rest) * lanes parts, of which the lane takes len(rest) in a row
        first, end = index * len(rest), (index + 1) * len(rest)
        for i in range(first // lanes, -(-end // lanes)):
            part, stop = max(first - i * lanes, 0), min(end - i * lanes, lanes)
            shards.append((self.shards[rest[i]], part, lanes, stop - part))
        return shards

    def __iter__(self) -> Iterator[RawBatch]:
        """The batches of this process's lane, then an empty one that carries the samples skipped since the last."""
        worker = get_worker_info()
        lane = (self._first + (worker.id if worker else 0)) % self.lanes
        self._unusable: Callable[[], Picture] | None = None  # decodes the last image that could not be decoded
        queries: deque[Query] = deque()
        parts: list[RawBatch] = []
        skipped: Counter[str] = Counter()
        examples: dict[str, str] = {}

        def leave_out(reason: str, location: str) -> None:
            skipped[reason] += 1
            if reason != CACHED:
                examples.setdefault(reason, location)

        def batch(position: Position) -> RawBatch:
            made = RawBatch.cat(parts or [self._looked_up(deque(), leave_out)])
            made.lane, made.position, made.skipped, made.examples = lane, position, dict(skipped), dict(examples)
            for collected in (parts, skipped, examples):
                collected.clear()
            return made

        position = start = self._positions[lane]
        for position, sample, flipped in self._samples(lane, start):
            for reason, location in sample.ignored:
                leave_out(reason, location)
            for query in self._queries(sample, flipped):
                if isinstance(query, str):
                    leave_out(query, sample.location)
                    continue
                queries.append(query)
                room = self.batch_size - sum(map(len, parts))
                if len(queries) == room:
                    parts.append(self._looked_up(queries, leave_out))
                    if len(parts[-1]) == room:
                        yield batch(position)
        parts.append(self._looked_up(queries, leave_out))
        if self.drop_last:
            parts.clear()
        if any(map(len, parts)):
            yield batch(position)
        yield batch(position)

    def _queries(self, sample: TarSample, flipped: bool) -> Iterator[Query | str]:
        """The sample, or the reason why it is left out; with ``only_missing`` once for each of its captions."""
        features, latents, size = self.feature_cache, self.latent_cache, self.encoder_image_size
        try:
            decode: Callable[[], Picture] = partial(decode_image, sample, self.image_limits)
            if self.only_missing:  # several captions of one image
                decode = cache(decode)
            named = latents is not None or (size is not None and features is not None)
            for caption in self._captions(sample):
                name = image_key(sample, flipped) if named else None
                feature_key = caption if size is None else None
                if features is not None:
                    feature_key = features.key(caption, None if size is None else name)
                latent_key = name if latents is not None else None
                cached = self.only_missing and all(
                    cache is None or key is None or cache.holds(key)
                    for cache, key in ((features, feature_key), (latents, latent_key))
                )
                yield CACHED if cached else Query(caption, feature_key, latent_key, decode, flipped, sample.location)
        except UnusableSampleError as error:
            yield str(error)

    def _captions(self, sample: TarSample) -> Sequence[str]:
        """This pass's caption of the sample, or all that passes take; ``UnusableSampleError`` for none."""
        if sample.fault is not None:
            raise UnusableSampleError(sample.fault)
        found: Sequence[str] = ()
        every = self.only_missing and self.feature_cache is not None
        if self.captions is not None and every:
            found = self.captions.find_all(sample.location)
        elif self.captions is not None and (caption := self.captions.find(sample.location, self.seed, self._epoch)):
            found = (caption,)
        if found:
            return found
        if every:
            return decode_captions(sample, self.caption_column)
        return (decode_caption(sample, self.caption_column, self.seed, self._epoch),)

    def captions_per_sample(self, samples: int = 256) -> float:
        """Mean number of captions that passes take of a sample, by the first ``samples`` of a lane."""
        if self.captions is not None:
            return self.captions.per_image
        counts = []
        for _, sample, _ in islice(self._samples(0, Position()), samples):
            with suppress(UnusableSampleError):  # it is left out
                counts.append(len(self._captions(sample)))
        return sum(counts) / len(counts) if counts else 1.0

    def _looked_up(self, queries: deque[Query], leave_out: Callable[[str, str], None]) -> RawBatch:
        """The usable samples, looked up in the caches, each in one transaction; empties ``queries``.

        Decodes the images whose features or latents the caches lack.
        """
        features = Lookup([query.feature_key for query in queries], self.feature_cache)
        latents = Lookup([query.latent_key for query in queries], self.latent_cache)
        none = [False] * len(queries)
        square = self.images and not (self.only_missing and self.latent_cache is None)
        needs = (~latents.found).tolist() if square else none
        stretched = self.encoder_image_size is not None and not (self.only_missing and self.feature_cache is None)
        needs_stretched = (~features.found).tolist() if stretched else none
        images = ImageRows(sum(needs), self.transform.side)
        encoder_images = ImageRows(sum(needs_stretched), self.encoder_image_size or 1)
        captions, kept = list[str](), list[int]()
        for index, needed in enumerate(zip(needs, needs_stretched, strict=True)):
            query = queries.popleft()  # its decoder may hold an image
            if query.decode is self._unusable:  # another caption of the image
                continue
            try:
                pixels = self._decode(query, *needed)
            except UnusableSampleError as error:
                self._unusable = query.decode
                leave_out(str(error), query.location)
                continue
            images.add(pixels[0])
            encoder_images.add(pixels[1])
            captions.append(query.caption)
            kept.append(index)
        if len(kept) < len(features.keys):
            features, latents = features[kept], latents[kept]
        return RawBatch(captions, features, latents, images.filled, encoder_images.filled)

    def _decode(self, query: Query, square: bool, stretched: bool) -> tuple[Pixels, Pixels]:
        """The query's image as a square and stretched to one, where they are needed."""
        if not (square or stretched):
            return None, None
        image = query.decode()
        try:
            return (
                _flip(self.transform(image), query.flipped) if square else None,
                _flip(stretch_to_square(image, self.encoder_image_size or 1), query.flipped) if stretched else None,
            )
        except (MemoryError, OverflowError, RuntimeError, ValueError) as error:  # too large, at a high aspect ratio
            raise UnusableSampleError("image that cannot be resized") from error

    def _samples(self, lane: int, position: Position) -> Iterator[tuple[Position, TarSample, bool]]:
        """The lane's samples from ``position`` on, as (position after the sample, sample, True if it is mirrored)."""
        size = max(self.shuffle_block, 1)
        source = self._read(lane, position)
        if self.limit is not None:
            source = islice(source, len(range(self.rank * self.lanes + lane, self.limit, self.ranks * self.lanes)))
        start, first, number = position, size, self.rank * self.lanes + lane
        if self.cuts_first_block:
            first = 1 + int(np.random.default_rng([self.seed, self._epoch, number]).integers(size))
        while True:
            block = list(islice(source, size if start.block else first))
            if not block:
                return
            rng = np.random.default_rng([self.seed, self._epoch, number, start.block])
            order = rng.permutation(len(block)) if self.shuffle_block > 1 else range(len(block))
            flips = rng.random(len(block)) < 0.5 if self.flip else np.zeros(len(block), bool)
            for emitted in range(start.emitted, len(block)):
                at = int(order[emitted])
                yield start._replace(emitted=emitted + 1), block[at][1], bool(flips[at])
            start = block[-1][0]._replace(block=start.block + 1, emitted=0)
            block.clear()  # before the next one is read

    def _read(self, lane: int, position: Position) -> Iterator[tuple[Position, TarSample]]:
        """The lane's undecoded samples in shard order, from the start of the block at ``position`` on."""
        offset, number = position.offset, position.number
        shards = list(enumerate(self.lane_shards(self._epoch, lane)))
        for shard, (source, part, parts, width) in shards[position.shard :]:
            read = partial(read_samples, source) if isinstance(source, str) else source.samples
            for sample in read(offset, number, part, parts, self.member_mb, self.wanted, width):
                yield position._replace(shard=shard, offset=sample.end, number=sample.number + 1), sample
            offset = number = 0

    def wanted(self, key: str) -> bool:
        """Whether the sample with this key is on the stream's side of ``share``."""
        if self.share == 0:
            return True
        digest = blake2b(key.encode("utf-8", "surrogateescape"), digest_size=4).digest()
        return (int.from_bytes(digest, "big") < self.share * 2**32) == self.held_out


def _flip(image: NDArray[np.uint8], flipped: bool) -> NDArray[np.uint8]:
    return image[:, ::-1] if flipped else image
