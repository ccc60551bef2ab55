"""64 ranks share uneven shards: no sample twice and none lost, resumed and with another number of ranks as well."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.streams import ShardStream
from tests.data.tars import SIDE, write_tar

RANKS = 64


def uneven(folder: Path, shards: int) -> list[str]:
    """Shards of 0 to some dozens of captions."""
    sizes = np.random.default_rng(shards).lognormal(1, 1, shards).astype(int)
    members = iter(range(10**9))
    texts = [{f"{n}.txt": f"sample {n}".encode() for n, _ in zip(members, range(size), strict=False)} for size in sizes]
    return [write_tar(folder / f"{number}.tar", each) for number, each in enumerate(texts)]


def all_captions(shards: Sequence[str]) -> list[str]:
    return sorted(c for batch in ShardStream(shards, SquareTransform(SIDE), 64, images=False) for c in batch.captions)


def loaders(shards: Sequence[str], ranks: int, seed: int = 0) -> list[ShardLoader]:
    options = {"images": False, "shuffle_block": 4, "seed": seed, "ranks": ranks}
    return [ShardLoader(ShardStream(shards, SquareTransform(SIDE), 2, rank=rank, **options)) for rank in range(ranks)]


def read(loader: ShardLoader, batches: int | None = None) -> list[str]:
    """The captions of as many batches of this pass, all of them trained on; of a rank without a sample none."""
    found, epoch = list[str](), loader._epoch
    if batches == 0:
        return found
    with suppress(ValueError):  # "gave no batch"
        for number, batch in enumerate(loader, 1):
            if loader._epoch > epoch:  # the pass was over already
                break
            loader.acknowledge(batch)
            found += batch.captions
            if number == batches:
                break
    return found


def gathered(loaders: Sequence[ShardLoader]) -> dict[str, Any]:
    """The state that the ranks save together."""
    states = [loader.state_dict() for loader in loaders]
    return {"identity": states[0]["identity"], "ranks": [state["ranks"][0] for state in states]}


@pytest.mark.parametrize("shards", [3, 64, 100])
def test_every_sample_is_read_once_through_a_resume_and_by_other_ranks(tmp_path: Path, shards: int) -> None:
    paths = uneven(tmp_path, shards)
    expected = all_captions(paths)
    began = loaders(paths, RANKS)
    seen = [caption for rank, loader in enumerate(began) for caption in read(loader, rank % 4)]
    assert 0 < len(seen) < len(expected)
    state = gathered(began)
    resumed = loaders(paths, RANKS)
    for loader in resumed:
        loader.load_state_dict(state)
        seen += read(loader)
    assert sorted(seen) == expected
    others, first = loaders(paths, 40), []
    for loader in others:
        with pytest.warns(UserWarning, match="other ranks than the checkpoint's"):
            loader.load_state_dict(state)
        first += read(loader)
    assert sorted(first) == expected
