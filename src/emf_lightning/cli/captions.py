"""`emf captions`: writes a file of prompts as shards without images."""

from __future__ import annotations

import hashlib
from pathlib import Path

from emf_lightning.data.prompt_list import PromptList
from emf_lightning.data.reading.dataset_shards import write_samples


def captions(prompts: Path, out: Path, samples_per_shard: int = 10_000) -> None:
    """Write a file of prompts as shards of captions alone, for training without images (FGM).

    Read them with `data.images: false`.

    Args:
        prompts: text file with one prompt a line.
        out: directory of the shards.
        samples_per_shard: samples a shard; a data worker reads one shard at a time.
    """
    texts = PromptList(prompts).prompts
    identity = {"prompts": hashlib.sha256("\n".join(texts).encode()).hexdigest(), "rows": len(texts)}
    paths = write_samples(((None, text) for text in texts), out, identity, samples_per_shard)
    print(f"{len(texts):,} captions in {len(paths)} shards: {out}")
