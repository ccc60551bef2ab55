"""`emf images`: writes an image data set as shards."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from emf_lightning.data.reading.dataset_shards import dataset_samples, open_dataset, unlisted_images, write_samples
from emf_lightning.data.reading.pixels import ImageLimits


def images(
    dataset: str,
    out: Path,
    split: str = "train",
    caption: str = "a photo",
    samples_per_shard: int = 2000,
    revision: str | None = None,
    image_limits: ImageLimits = ImageLimits(),
) -> None:
    """Write an image data set of the Hugging Face hub, or a local copy of one, as caption-image shards.

    CIFAR-10 is `uoft-cs/cifar10`, CelebA-HQ at 256 px `korexyz/celeba-hq-256x256`. Repeat a call that was
    interrupted: it writes the missing shards. Rows without a usable image or a caption are left out and counted, and
    so are images of a folder that its metadata file does not list.

    Args:
        dataset: hub name, folder of parquet or image files, or folder written by `save_to_disk`.
        out: directory of the shards.
        split: of the data set.
        caption: column of captions or classes, or one text for all images.
        samples_per_shard: samples a shard; a data worker reads one shard at a time.
        revision: branch, tag or commit on the hub.
        image_limits: bounds beyond which an image is left out and counted.
    """
    opened = open_dataset(dataset, split, revision)
    identity = {
        "dataset": Path(dataset).name,
        "split": split,
        "rows": len(opened),
        "caption": caption,
        "fingerprint": opened._fingerprint,  # of the files and their times, or of the hub's revision
        "image_limits": asdict(image_limits),
    }
    rows: dict[str, list[str]] = defaultdict(list)
    with tqdm(desc=f"{out}", total=len(opened), unit="image", delay=0.1) as bar:
        samples = dataset_samples(opened, caption, image_limits, lambda n, why: rows[why].append(f"row {n:,}"))
        try:
            paths = write_samples(samples, out, identity, samples_per_shard, lambda done: bar.update(done - bar.n))
        except ValueError as error:
            if len(opened) == sum(map(len, rows.values())) > 0:
                raise ValueError(f"dataset: no row can be used: {_counts(rows)}") from error
            raise
    written = len(opened) - sum(map(len, rows.values()))
    print(f"{written:,} samples in {len(paths)} shards: {out}")
    if unlisted := unlisted_images(opened, dataset, split):
        rows["not listed in the metadata file"] = unlisted
    if rows:
        print(f"left out: {_counts(rows)}")


def _counts(rows: dict[str, list[str]]) -> str:
    """The number of rows or files by reason, and the first of each."""
    return ", ".join(f"{len(names):,} x {reason} ({names[0]} first)" for reason, names in rows.items())
