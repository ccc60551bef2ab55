"""`emf images`: writes an image data set as shards."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from emf_lightning.data.reading.dataset_shards import dataset_samples, open_dataset, write_samples


def images(
    dataset: str,
    out: Path,
    split: str = "train",
    caption: str = "a photo",
    samples_per_shard: int = 2000,
    revision: str | None = None,
) -> None:
    """Write an image data set of the Hugging Face hub, or a local copy of one, as caption-image shards.

    CIFAR-10 is `uoft-cs/cifar10`, CelebA-HQ at 256 px `korexyz/celeba-hq-256x256`. Repeat a call that was
    interrupted: it writes the missing shards.

    Args:
        dataset: hub name, folder of parquet or image files, or folder written by `save_to_disk`.
        out: directory of the shards.
        split: of the data set.
        caption: column of captions or classes, or one text for all images.
        samples_per_shard: samples a shard; a data worker reads one shard at a time.
        revision: branch, tag or commit on the hub.
    """
    opened = open_dataset(dataset, split, revision)
    identity = {"dataset": Path(dataset).name, "split": split, "rows": len(opened), "caption": caption}
    with tqdm(desc=f"{out}", total=len(opened), unit="image", delay=0.1) as bar:
        samples = dataset_samples(opened, caption)
        paths = write_samples(samples, out, identity, samples_per_shard, lambda done: bar.update(done - bar.n))
    print(f"{len(opened):,} samples in {len(paths)} shards: {out}")
