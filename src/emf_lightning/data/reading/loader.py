"""The iterable that Lightning's loops train on: batches of passes over the shards, and the state to go on from."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from emf_lightning.data.reading.streams import Position, RawBatch, ShardStream

BATCHES_AHEAD = 4
"""Batches that a worker prepares in advance."""


class ShardLoader:
    """One pass over the shards an iteration; the next iteration goes on with the next pass.

    Its state is that of the last batch *acknowledged*, because neither what workers prepared nor what Lightning
    fetched ahead (it holds one batch back to know the last one) has been trained on. An iteration that is begun anew
    goes on behind the last acknowledged batch; Lightning begins more than one at a restart.

    Args:
        stream: this rank's.
        num_workers: processes that read; the stream must have as many lanes (1 for 0).
        pin_memory: puts images into page-locked memory.

    Attributes:
        skipped: reason -> samples left out by this rank so far.
    """

    def __init__(self, stream: ShardStream, *, num_workers: int = 0, pin_memory: bool = False) -> None:
        assert stream.lanes == max(num_workers, 1)
        self.stream = stream
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.skipped: Counter[str] = Counter()
        self._warned: set[tuple[str, str]] = set()
        self._group: Any = None
        self._acknowledged = 0
        self._pending: deque[tuple[int, Callable[[], None]]] = deque()
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self._epoch, self._positions, self._first = epoch, [Position()] * self.stream.lanes, 0
        self._finished = False

    def __iter__(self) -> Iterator[RawBatch]:
        """The batches of the rest of this pass, or of the next one where this pass is over.

        Raises:
            ValueError: for a whole pass without a batch.
        """
        if self._finished:
            self._begin(self._epoch + 1)
        self._acknowledged = 0
        self._pending.clear()
        fresh = not any(any(position) for position in self._positions)
        count = 0
        for batch in self._together(self._batches()):
            count = batch.ticket
            yield batch
        if count == 0 and fresh:
            raise ValueError(self._why_nothing())
        while self._pending and self._pending[-1][0] > count:  # of a batch that another rank had no partner for
            self._pending.pop()
        self._when(count, self._finish)
        if count == 0:  # resumed at the very end of a pass
            yield from self

    def _finish(self) -> None:
        self._finished = True

    def _batches(self) -> Iterator[RawBatch]:
        """All batches of this rank, numbered from 1."""
        self.stream.start(self._epoch, self._positions, self._first)
        loader = DataLoader(
            self.stream,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=BATCHES_AHEAD if self.num_workers else None,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # its own: a loader must not move the global one on
        )
        ticket = 0
        for batch in loader:
            self._warn(batch)
            ticket += len(batch) > 0
            batch.ticket = ticket
            self._when(ticket, self._change(batch))
            if len(batch):
                yield batch

    def _change(self, batch: RawBatch) -> Callable[[], None]:
        def apply() -> None:
            self._positions[lane] = position
            self._first = (lane + 1) % self.stream.lanes
            self.skipped.update(skipped)

        lane, position, skipped = batch.lane, batch.position, batch.skipped  # not the batch: it would stay in memory
        return apply

    def _when(self, ticket: int, change: Callable[[], None]) -> None:
        """Makes ``change`` to the state as soon as batch ``ticket`` is acknowledged."""
        if ticket <= self._acknowledged:
            change()
        else:
            self._pending.append((ticket, change))

    def acknowledge(self, batch: RawBatch) -> None:
        """Moves the state behind ``batch``; call it for each batch that is used, in order."""
        self._acknowledged = batch.ticket
        while self._pending and self._pending[0][0] <= batch.ticket:
            self._pending.popleft()[1]()

    def _warn(self, batch: RawBatch) -> None:
        for reason, where in batch.examples.items():
            shard_fault = "shard" in reason
            if (reason, where if shard_fault else "") in self._warned:
                continue
            self._warned.add((reason, where if shard_fault else ""))
            more = "the samples behind it are lost" if shard_fault else "further ones are counted without a warning"
            warnings.warn(f"{where}: {reason}; left out, {more}", stacklevel=2)

    # -- ranks -------------------------------------------------------------------------------------------------------

    @property
    def _distributed(self) -> bool:
        return self.stream.ranks > 1 and dist.is_available() and dist.is_initialized()

    def _cpu_group(self) -> Any:
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group

    def _together(self, batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
        """The batches while every rank has one: a rank that trained on alone would wait for the others for ever."""
        for batch in batches:
            if not self._all_have(True):
                return
            yield batch
        self._all_have(False)

    def _all_have(self, one: bool) -> bool:
        if not self._distributed:
            return one
        have = torch.tensor(int(one))
        dist.all_reduce(have, dist.ReduceOp.MIN, group=self._cpu_group())
        return bool(have)

    # -- state -------------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What the positions refer to."""
        stream = self.stream
        names = "\n".join(shard.rpartition("/")[2] for shard in stream.shards)  # names: a folder may have been moved
        return {
            "shards": hashlib.sha256(names.encode()).hexdigest(),
            "seed": stream.seed,
            "shuffle_block": stream.shuffle_block,
            "ranks": stream.ranks,
            "workers": stream.lanes,
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
            dist.all_gather_object(everyone, own, group=self._cpu_group())
        return {"identity": self._identity(), "ranks": everyone}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken; with other shards, shuffle, ranks or workers, at the next pass's start."""
        identity = self._identity()
        changed = [name for name in identity if state["identity"].get(name) != identity[name]]
        own = state["ranks"][min(self.stream.rank, len(state["ranks"]) - 1)]
        self.skipped = Counter(own["skipped"])
        if changed:
            warnings.warn(
                f"resumed with other {', '.join(changed)} than the checkpoint's: its place in the data means nothing"
                f" here, training goes on at the beginning of pass {own['epoch'] + 1}",
                stacklevel=2,
            )
            self._begin(own["epoch"] + 1)
            return
        self._epoch, self._finished, self._first = own["epoch"], own["finished"], own["first"]
        self._positions = [Position(*position) for position in own["positions"]]

    def _why_nothing(self) -> str:
        for _, change in self._pending:
            change()
        counts = ", ".join(f"{count} x {reason}" for reason, count in sorted(self.skipped.items()))
        stream = self.stream
        return (
            f"a whole pass over {len(stream.shards)} shards ({stream.shards[0]}, ...) gave no batch of"
            f" {stream.batch_size} samples ({counts or 'none skipped'}); check the shards, or lower batch_size or"
            " num_workers"
        )
