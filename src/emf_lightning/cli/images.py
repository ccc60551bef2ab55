"""`emf images`: an image data set as shards."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from emf_lightning.data.reading.dataset_shards import open_dataset, samples_of, write_samples


def images(
    dataset: str,
    out: Path,
    split: str = "train",
    caption: str = "a photo",
    samples_per_shard: int = 2000,
    revision: str | None = None,
) -> None:
    """Write an image data set of the Hugging Face hub, or a local copy of one, as caption-image shards.

    CIFAR-10 is `uoft-cs/cifar10`, CelebA-HQ at 256 px `korexyz/celeba-hq-256x256`. A call that was interrupted is
    repeated; it goes on with the shards that are missing.

    Args:
        dataset: hub name, folder of parquet or picture files, or folder written by `save_to_disk`.
        out: directory of the shards.
        split: of the data set.
        caption: a column with captions or classes, or a text that is every picture's caption.
        samples_per_shard: a shard is what a data worker takes at a time.
        revision: branch, tag or commit on the hub.
    """
    opened = open_dataset(dataset, split, revision)
    identity = {"dataset": Path(dataset).name, "split": split, "rows": len(opened), "caption": caption}
    with tqdm(desc=f"{out}", total=len(opened), unit="image", delay=0.1) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        samples = samples_of(opened, caption)
        paths = write_samples(samples, out, identity, samples_per_shard, show)
    print(f"{len(opened):,} samples in {len(paths)} shards: {out}")
