"""`emf shards`: writes a shapes world as caption-image shards."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from emf_lightning.data.shapes.prompts import write_captions
from emf_lightning.data.shapes.scenes import TASK_WEIGHTS
from emf_lightning.data.shapes.shards import write_shards
from emf_lightning.data.shapes.world import WORLDS

_MISSING = re.compile(
    r"'(data/shapes/(small|full))/(?:(?:train|validation)' matches no file|captions\.txt' \(No such file)"
)


def missing_shards(message: str) -> str:
    """The commands that write the shards that an error's ``message`` misses, if they are a shapes world's."""
    if (found := _MISSING.search(message)) is None:
        return ""
    folder, world = found.groups()
    train = f"emf shards --world {world} --count 50000 --seed 0 --out {folder}/train --captions {folder}/captions.txt"
    return f"; first run: {train} && emf shards --world {world} --count 1000 --seed 1 --out {folder}/validation"


def shards(
    out: Path,
    world: Literal["small", "full"] = "small",
    count: int = 50_000,
    seed: int = 0,
    samples_per_shard: int = 2000,
    workers: int | None = None,
    captions: Path | None = None,
) -> None:
    """Write caption-image shards of a shapes world: WebDataset tars of .png, .txt and .json.

    Repeat a call that was interrupted: it writes the missing shards.

    Args:
        out: directory of the shards.
        world: the laptop's 36 px world or the 96 px one.
        count: total number of samples.
        seed: of the scenes; use another one for validation.
        samples_per_shard: samples a shard; a data worker reads one shard at a time.
        workers: rendering processes; by default one for each CPU core.
        captions: text file to write as well: as many captions of random compositions, those that no image shows
            included, for data.sampling_captions.
    """
    processes = (os.cpu_count() or 1) if workers is None else workers
    for name, value in (("seed", seed), ("workers", processes)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    number = -(-count // max(samples_per_shard, 1))
    if number < 2 * processes:
        processes = 0  # starting a process takes longer than rendering a shard
    with tqdm(desc=f"{out}", total=number, unit="shard", delay=0.1) as bar:

        def show(done: int, total: int) -> None:
            bar.update(done - bar.n)

        paths = write_shards(
            WORLDS[world], out, count, seed=seed, samples_per_shard=samples_per_shard, workers=processes, progress=show
        )
    if captions is not None:
        write_captions(captions, WORLDS[world], count, seed, TASK_WEIGHTS)
    print(f"{count:,} samples in {len(paths)} shards: {out}")
