"""Data loader over passes of the shards, with a state that resumes at any batch."""

from __future__ import annotations

import atexit
import hashlib
import math
import multiprocessing
import os
import signal
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from emf_lightning.data.reading.raw_batch import Position, RawBatch
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.text.plain import shorten

BATCHES_AHEAD = 4
"""Batches that a worker prepares in advance."""

LEAST_SHARE = 0.9
"""Share of a pass below which its end says how much was left."""

DEALING = "dealing of shards"
"""Key of the rule by which shards that do not divide evenly are dealt, where there are any."""

OUTLIVES = 600
"""Seconds after SIGTERM at which a worker ends by itself."""


def _outlive(worker: int) -> None:
    """Lets a data worker go on after SIGTERM: a scheduler sends it to all processes of a job, and the trainer needs
    the worker's batches until it has saved its state.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(OUTLIVES))  # torch ends its workers by another way first


def _end_workers() -> None:
    """Ends the workers of a process that an exception ends: its traceback keeps their loader, so that torch does not
    end them, and multiprocessing would send SIGTERM and wait.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


atexit.register(_end_workers)  # after multiprocessing's own function, so it runs before


class ShardLoader:
    """Iterates over one pass of the shards; the next iteration reads the next pass.

    The state is that of the last *acknowledged* batch, because batches that workers prepared or Lightning prefetched
    (it holds one back to know the last one) have not been trained on. A new iteration within a pass starts after the
    last acknowledged batch; Lightning starts more than one at a restart.

    Args:
        stream: the stream of this rank.
        num_workers: reading processes; the stream must have as many lanes (1 for 0).
        pin_memory: puts batches into page-locked memory.
        acknowledges: takes a batch as trained on once the next one is asked for, for loops without a Trainer; one that
            saves its state within a pass calls ``acknowledge`` before.

    Attributes:
        skipped: reason -> samples left out by this rank so far.
    """

    def __init__(
        self, stream: ShardStream, *, num_workers: int = 0, pin_memory: bool = False, acknowledges: bool = False
    ) -> None:
        assert stream.lanes == max(num_workers, 1)
        self.acknowledges = acknowledges
        self.stream = stream
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.skipped: Counter[str] = Counter()
        self._warned: set[tuple[str, str]] = set()
        self._acknowledged = 0
        self._pending: deque[tuple[int, Callable[[], None]]] = deque()
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self._epoch, self._positions, self._first = epoch, [Position()] * self.stream.lanes, 0
        self._finished = False

    def __iter__(self) -> Iterator[RawBatch]:
        """The batches left of this pass, or those of the next if it is over; ValueError for a pass without a batch."""
        if self._finished:
            self._begin(self._epoch + 1)
        self._acknowledged = 0
        self._pending.clear()
        fresh = not any(any(position) for position in self._positions)
        count = 0
        for batch in self._while_all_ranks_have(self._batches()):
            count = batch.ticket
            yield batch
            if self.acknowledges:
                self.acknowledge(batch)
        if count == 0 and fresh:
            raise ValueError(self._empty_pass())
        while self._pending and self._pending[-1][0] > count:  # a batch that some other rank had no counterpart for
            self._pending.pop()
        self._after(count, partial(setattr, self, "_finished", True))
        if count == 0:  # resumed at the very end of a pass
            yield from self

    def _batches(self) -> Iterator[RawBatch]:
        """All batches of this rank, numbered from 1."""
        self.stream.start(self._epoch, self._positions, self._first)
        loader = DataLoader(
            self.stream,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=BATCHES_AHEAD if self.num_workers else None,
            pin_memory=self.pin_memory,
            worker_init_fn=_outlive,
            generator=torch.Generator(),  # DataLoader would advance the global generator otherwise
        )
        ticket = 0
        for batch in loader:
            self._warn(batch)
            ticket += len(batch) > 0
            batch.ticket = ticket
            # not the batch itself, which would stay in memory
            self._after(ticket, partial(self._advance, batch.lane, batch.position, batch.skipped))
            if len(batch):
                yield batch

    def _advance(self, lane: int, position: Position, skipped: dict[str, int]) -> None:
        self._positions[lane] = position
        self._first = (lane + 1) % self.stream.lanes
        self.skipped.update(skipped)

    def _after(self, ticket: int, change: Callable[[], None]) -> None:
        """Applies ``change`` to the state once batch ``ticket`` is acknowledged."""
        if ticket <= self._acknowledged:
            change()
        else:
            self._pending.append((ticket, change))

    def acknowledge(self, batch: RawBatch) -> None:
        """Advances the state past ``batch``; call it for each batch that is trained on, in order."""
        self._acknowledged = batch.ticket
        while self._pending and self._pending[0][0] <= batch.ticket:
            self._pending.popleft()[1]()

    def _warn(self, batch: RawBatch) -> None:
        for reason, location in batch.examples.items():
            # faults of shards are told for each shard, all else once
            kind = (reason, location.partition(" from byte ")[0] if "shard" in reason else "")
            if kind not in self._warned:
                self._warned.add(kind)
                further = " in this shard" if kind[1] else ""
                message = f"{location}: {reason}; left out, further ones{further} are counted without a warning"
                warnings.warn(shorten(message, 400), stacklevel=2)

    # -- ranks -------------------------------------------------------------------------------------------------------

    @property
    def _distributed(self) -> bool:
        return self.stream.ranks > 1 and dist.is_available() and dist.is_initialized()

    @cached_property
    def _cpu_group(self) -> Any:
        return dist.new_group(backend="gloo")

    def _while_all_ranks_have(self, batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
        """The batches as long as every rank has one: a rank that trains alone would wait for the others forever."""
        for batch in batches:
            if not self._all_ranks(True):
                break
            yield batch
        else:
            self._all_ranks(False)
        if self._distributed and self.stream.limit is None and self._epoch == 0:
            self._warn_of_rest()

    def _warn_of_rest(self) -> None:
        """Says how much of a pass is left where it is more than a tenth; a collective of all ranks."""
        own = torch.tensor([sum(map(self._size_of_lane, range(self.stream.lanes)))], dtype=torch.float64)
        least = own.clone()
        dist.all_reduce(own, group=self._cpu_group)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._cpu_group)
        share = float(self.stream.ranks * least / own)
        if share < LEAST_SHARE and self.stream.rank == 0:
            warnings.warn(
                f"a pass trains on about {share:.0%} of the data: it ends for all ranks with the one that has least, "
                "and what is left is mostly of the largest shards; write shards of about the same size",
                stacklevel=2,
            )

    def _size_of_lane(self, lane: int) -> float:
        """Bytes of the shards that a lane reads in this pass; NaN where not all are local files."""
        dealt = self.stream.lane_shards(self._epoch, lane)
        try:
            sizes = [os.path.getsize(source) for source, *_ in dealt]  # type: ignore[arg-type]
        except (OSError, TypeError):
            return math.nan
        return sum(size * width / of for size, (_, _, of, width) in zip(sizes, dealt, strict=True))

    def _all_ranks(self, has_batch: bool) -> bool:
        if not self._distributed:
            return has_batch
        have = torch.tensor(int(has_batch))
        dist.all_reduce(have, dist.ReduceOp.MIN, group=self._cpu_group)
        return bool(have)

    # -- state -------------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """Settings under which saved positions are valid."""
        stream = self.stream
        # names only: a folder may have moved
        names = [shard.rpartition("/")[2] if isinstance(shard, str) else shard.identity for shard in stream.shards]
        held_out = {"validation_share": stream.share} if stream.share else {}
        ways = [way for way, used in (("rest in turn", stream.splits_rest), ("folders to all", stream.folders)) if used]
        dealing = {DEALING: ", ".join(ways)} if ways else {}
        return {
            "shards": hashlib.sha256("\n".join(names).encode()).hexdigest(),
            "seed": stream.seed,
            "shuffle_block": stream.shuffle_block,
            "ranks": stream.ranks,
            "workers": stream.lanes,
            **held_out,
            **dealing,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks; in a distributed run every rank must call it."""
        own = {
            "epoch": self._epoch,
            "finished": self._finished,
            "positions": [list(position) for position in self._positions],
            "first": self._first,
            "skipped": dict(self.skipped),
        }
        everyone: list[Any] = [own]
        if self._distributed:
            everyone = [None] * self.stream.ranks
            dist.all_gather_object(everyone, own, group=self._cpu_group)
        return {"identity": self._identity(), "ranks": everyone, "whole_pass": self.stream.whole_pass}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes at ``state``; with other shards, shuffle, ranks or workers, at the start of the next pass."""
        identity = self._identity()
        names = [*identity, *({"validation_share"} & state["identity"].keys() - identity.keys())]
        changed = [name for name in names if state["identity"].get(name) != identity.get(name)]
        own = state["ranks"][min(self.stream.rank, len(state["ranks"]) - 1)]
        self.skipped = Counter(own["skipped"])
        if changed:
            told = [name for name in changed if name != DEALING] or changed  # it depends on shards, ranks and workers
            warnings.warn(
                f"resumed with other {', '.join(told)} than the checkpoint's: its position in the data does not"
                f" apply, training continues at the start of pass {own['epoch'] + 1}",
                stacklevel=2,
            )
            self._begin(own["epoch"] + 1)
            return
        self.stream.whole_pass = state.get("whole_pass", own["epoch"])  # earlier versions had no other passes
        self._epoch, self._finished, self._first = own["epoch"], own["finished"], own["first"]
        self._positions = [Position(*position) for position in own["positions"]]

    def _empty_pass(self) -> str:
        """Message for a pass without a batch."""
        for _, change in self._pending:
            change()
        counts = ", ".join(f"{count} x {reason}" for reason, count in sorted(self.skipped.items()))
        stream = self.stream
        remedy = "raise validation_share" if stream.held_out else "lower batch_size or num_workers"
        if stream.limit is not None and stream.limit < stream.ranks * stream.lanes:
            remedy = f"raise validation_samples: {stream.limit} leave some of {stream.ranks} processes without one"
        return (
            f"a whole pass over {len(stream.shards)} shards ({stream.shards[0]}, ...) gave no batch of"
            f" {stream.batch_size} samples ({counts or 'none skipped'}); check the shards, or {remedy}"
        )
