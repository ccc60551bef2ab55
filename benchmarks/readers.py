"""What the benchmark of the data path compares: each reader in a process of its own, which measures when it is asked.

A request is a line of JSON, a task and its arguments; the answer is a line with CPU seconds, of this process and its
loader workers, for one sample. "peak" asks for MB that this process, and a worker, have held at most.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

LENGTH, WIDTH, BATCH, ENTRIES, WRITTEN = 730, 2304, 16, 64, 32
"""BLIP3o-NEXT's features; entries that are read and written in one go."""


@cache
def features(rows: int, length: int, width: int) -> Tensor:
    """Normal numbers, which is what a norm leaves; a few channels ten times as large, as language models have."""
    context = torch.randn(rows, length, width, generator=torch.Generator().manual_seed(0))
    context[..., ::500] *= 10
    return context


def captions(shard: str) -> list[str]:
    """The captions of ``shard``: numbers."""
    return [str(number) for number in range(int(Path(shard).stem))]


class Emf:
    """This project, or an earlier state of it."""

    def pictures(self, shard: str, side: int) -> int:
        """Samples of one pass, square, in batches."""
        from emf_lightning.data.reading.decoding import SquareTransform
        from emf_lightning.data.reading.streams import ShardStream

        return sum(map(len, ShardStream([shard], SquareTransform(side), BATCH)))

    def _cache(self, path: Path, dtype: str, length: int, width: int) -> Any:
        from emf_lightning.data.cache.feature_cache import FeatureCache

        opened = FeatureCache(path, 2.0, dtype)  # type: ignore[arg-type]
        opened._open("benchmark", length, width)
        opened._variant = ""
        return opened

    def _store(self, opened: Any, names: list[str], length: int, width: int) -> None:
        from emf_lightning.text.base import TextFeatures

        size = BATCH if length == LENGTH else 512
        rows = features(size, length, width)
        for first in range(0, len(names), size):
            part = names[first : first + size]
            opened.store(part, TextFeatures(rows[: len(part)], torch.ones(len(part), length, dtype=torch.bool)))

    def fill(self, shard: str, dtype: str, length: int, width: int) -> int:
        """The cache that ``read`` reads."""
        self._store(
            self._cache(Path(shard).with_suffix(f".{dtype}"), dtype, length, width), captions(shard), length, width
        )
        return 1

    def read(self, shard: str, dtype: str, length: int, width: int, batch: int) -> int:
        """Samples of one pass of a loader with a worker, all of them in the cache."""
        from emf_lightning.data.reading.decoding import SquareTransform
        from emf_lightning.data.reading.loader import ShardLoader
        from emf_lightning.data.reading.streams import ShardStream

        opened = self._cache(Path(shard).with_suffix(f".{dtype}"), dtype, length, width)
        stream = ShardStream([shard], SquareTransform(8), batch, feature_cache=opened, images=False)
        count = 0
        for each in ShardLoader(stream, num_workers=1):
            assert each.features.found.all()
            count += len(each)
        return count

    def write(self, folder: str, dtype: str) -> int:
        """Entries that were written into a new cache."""
        names = [str(number) for number in range(WRITTEN)]
        self._store(self._cache(Path(folder), dtype, LENGTH, WIDTH), names, LENGTH, WIDTH)
        return WRITTEN


def torchvision_square(side: int) -> Any:
    """The usual pipeline on Pillow's images, to ``[3, side, side]``."""
    from torchvision.transforms import v2

    bicubic = v2.InterpolationMode.BICUBIC
    return v2.Compose([v2.RGB(), v2.Resize(side, bicubic), v2.CenterCrop(side), v2.PILToTensor()])


class WebDataset:
    """webdataset, decoding by Pillow, torchvision's transforms."""

    def pictures(self, shard: str, side: int) -> int:
        import webdataset

        square = torchvision_square(side)
        samples = webdataset.WebDataset(shard, shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
        batches = samples.map_tuple(square, str).batched(BATCH)
        return sum(len(images) for images, _ in batches)


class HuggingFace:
    """``datasets``, streaming the same shard."""

    def pictures(self, shard: str, side: int) -> int:
        import datasets

        square = torchvision_square(side)
        rows = datasets.load_dataset("webdataset", data_files=shard, split="train", streaming=True)
        images = [square(row["jpg"]) for row in rows]
        return sum(len(torch.stack(images[first : first + BATCH])) for first in range(0, len(images), BATCH))


class LitData:
    """litdata, the files' bytes in its own chunks."""

    def pictures(self, shard: str, side: int) -> int:
        import io

        import litdata
        from PIL import Image

        folder = Path(shard).with_suffix(".litdata")
        if not folder.exists():
            writer = litdata.streaming.cache.Cache(str(folder), chunk_bytes="64MB")
            from emf_lightning.data.reading.tar_samples import read_samples

            for index, sample in enumerate(read_samples(shard)):
                writer[index] = {"jpg": sample.image, "txt": str(sample.text)}
            writer.done()
            writer.merge()
        square = torchvision_square(side)
        images = [square(Image.open(io.BytesIO(row["jpg"]))) for row in litdata.StreamingDataset(str(folder))]
        return sum(len(torch.stack(images[first : first + BATCH])) for first in range(0, len(images), BATCH))


class Files(Dataset[dict[str, Tensor]]):
    """Features in a safetensors file for each sample, collated by torch."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        found = load_file(self.paths[index])
        if "scale" in found:
            found = {"context": found["context"].bfloat16() * found["scale"], "mask": found["mask"]}
        return found

    def _save(self, folder: Path, names: list[str], dtype: str, length: int, width: int) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        rows, mask = features(BATCH, length, width), torch.ones(length, dtype=torch.bool)
        for number, name in enumerate(names):
            context, extra = rows[number % BATCH], {}
            if dtype == "float8":
                scale = context.abs().amax(-1, keepdim=True) / 448
                context, extra = (context / scale).to(torch.float8_e4m3fn), {"scale": scale.bfloat16()}
            else:
                context = context.to(getattr(torch, dtype))
            save_file({"context": context, "mask": mask, **extra}, folder / f"{name}.safetensors")

    def read(self, shard: str, dtype: str, length: int, width: int, batch: int) -> int:
        folder = Path(shard).with_suffix(f".{dtype}-files")
        if not folder.exists():
            self._save(folder, captions(shard), dtype, length, width)
        self.paths = [str(folder / f"{name}.safetensors") for name in captions(shard)]
        return sum(len(each["context"]) for each in DataLoader(self, batch_size=batch, num_workers=1))

    def write(self, folder: str, dtype: str) -> int:
        self._save(Path(folder), [str(number) for number in range(WRITTEN)], dtype, LENGTH, WIDTH)
        return WRITTEN


class Copies(IterableDataset[Tensor]):
    """The floor: numbers from memory into a worker's batches; and from memory into files."""

    def __iter__(self) -> Iterator[Tensor]:
        from emf_lightning.data.shared_memory import empty

        for _ in range(0, self.count, len(self.rows)):
            batch = empty(*self.rows.shape, dtype=self.rows.dtype)
            batch.copy_(self.rows)
            yield batch

    def read(self, shard: str, dtype: str, length: int, width: int, batch: int) -> int:
        stored = torch.bfloat16 if dtype == "float8" else getattr(torch, dtype)
        self.rows, self.count = _rows(batch, length, width, stored), len(captions(shard))
        return sum(map(len, DataLoader(self, batch_size=None, num_workers=1)))

    def write(self, folder: str, dtype: str) -> int:
        Path(folder).mkdir()
        stored = torch.float8_e4m3fn if dtype == "float8" else getattr(torch, dtype)
        for number in range(WRITTEN):
            row = features(BATCH, LENGTH, WIDTH)[number % BATCH].to(stored)
            with Path(folder, str(number)).open("wb", buffering=0) as file:
                file.write(row.view(torch.uint8).numpy().data)
                os.fsync(file.fileno())
        return WRITTEN


@cache
def _rows(count: int, length: int, width: int, dtype: torch.dtype) -> Tensor:
    return features(count, length, width).to(dtype)


READERS = {
    "emf": Emf,
    "webdataset": WebDataset,
    "datasets": HuggingFace,
    "litdata": LitData,
    "safetensors": Files,
    "memcpy": Copies,
}


def seconds() -> float:
    """CPU seconds of this process and of its workers that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Answers until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--without", nargs="*", default=[], help="modules that are as if they were not installed")
    options = parser.parse_args()
    sys.modules.update(dict.fromkeys(options.without))
    torch.set_num_threads(1)
    reader = READERS[options.reader]()
    for line in sys.stdin:
        task, *arguments = json.loads(line)
        answer: Any = None
        if task == "peak":
            answer = [
                resource.getrusage(who).ru_maxrss / 1000 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            ]
        elif hasattr(reader, task):
            began = seconds()
            count = getattr(reader, task)(*arguments)
            answer = (seconds() - began) / count
        if task == "write":
            shutil.rmtree(arguments[0], ignore_errors=True)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
