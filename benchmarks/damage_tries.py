"""Damages what a healthy run wrote, reads it, and judges what came of it."""

from __future__ import annotations

import io
import random
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from diffusers.utils import logging
from PIL import Image
from tests.data.tars import noise_image, write_numbered

from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.modules.checkpoint import read_checkpoint
from emf_lightning.pipeline import EMFPipeline

OUTCOMES = ("right", "refused", "counted", "lost", "traceback", "hung")


@dataclass
class Table:
    """Outcomes by kind of fault, and an example of each bad one."""

    rows: dict[str, Counter[str]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def add(self, fault: str, outcome: str, detail: str = "") -> None:
        self.rows.setdefault(fault, Counter())[outcome] += 1
        if outcome in ("lost", "traceback", "hung"):
            self.bad.append(f"{fault}: {outcome}: {detail}")
            print(self.bad[-1], flush=True)


def damage(path: Path, rng: random.Random) -> str:
    """Damages a file in one of five ways at a random position; returns the way."""
    data = bytearray(path.read_bytes())
    at, way = rng.randrange(len(data)), rng.choice(("flip", "zeros", "noise", "truncate", "insert"))
    if way == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif way == "zeros":
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    elif way == "noise":
        data[at : at + 256] = rng.randbytes(len(data[at : at + 256]))
    elif way == "truncate":
        del data[at:]
    else:
        data[at:at] = rng.randbytes(512)
    path.unlink()
    path.write_bytes(data)
    return f"{way} at {at} of {path.name}"


def copied(source: Path, place: Path) -> Path:
    """A fresh copy of a file or folder."""
    if source.is_dir():
        return Path(shutil.copytree(source, place / source.name, symlinks=True))
    return Path(shutil.copy(source, place))


def shard_try(table: Table, place: Path, rng: random.Random) -> None:
    """Reads a damaged shard: no sample may come with another's pixels or vanish uncounted."""
    path = Path(write_numbered(place, [12])[0])
    pixels = {f"sample {i}": _pixels(noise_image(i)) for i in range(12)}
    how = damage(path, rng)
    signal.signal(signal.SIGALRM, _hung)
    signal.alarm(30)
    given, counted = [], 0
    try:
        for batch in ShardStream([str(path)], SquareTransform(8), 4):
            counted += sum(batch.skipped.values())
            images = batch.images.permute(0, 2, 3, 1).numpy()
            given += [(caption, image.tobytes()) for caption, image in zip(batch.captions, images, strict=True)]
    except TimeoutError:
        table.add("a shard damaged at any place", "hung", how)
        return
    except Exception as error:
        table.add("a shard damaged at any place", "traceback", f"{how}: {error!r}")
        return
    finally:
        signal.alarm(0)
    # a tar file has no checksum of its members: damage within a caption gives another caption
    mixed = [caption for caption, image in given if caption in pixels and pixels[caption] != image]
    missing = len(pixels) - len(given)
    outcome = "lost" if mixed or (missing > 0 and not counted) else "counted" if missing > 0 else "right"
    table.add("a shard damaged at any place", outcome, f"{how}: mixed {mixed}, missing {missing}")


def _hung(*_: object) -> NoReturn:
    raise TimeoutError


def _pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).tobytes()


def checkpoint_try(table: Table, place: Path, rng: random.Random, world: Path) -> None:
    """Reads a damaged checkpoint: an error, or the weights that were saved."""
    path = copied(next(world.glob("runs/tiny/*/checkpoints/last.ckpt")).resolve(), place)
    want = read_checkpoint(path, "x")["state_dict"]
    want = {name: value.clone() for name, value in want.items()}
    how = damage(path, rng)
    try:
        found = read_checkpoint(path, "ckpt_path")["state_dict"]
        same = want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)
        table.add("a checkpoint damaged at any place", "right" if same else "lost", how)
    except ValueError:
        table.add("a checkpoint damaged at any place", "refused")
    except Exception as error:
        table.add("a checkpoint damaged at any place", "traceback", f"{how}: {error!r}")


def export_try(table: Table, place: Path, rng: random.Random, world: Path) -> None:
    """Loads a damaged exported folder: an error, or the images of the healthy one."""
    folder = copied(world / "export", place)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors"))
    how = damage(rng.choice(files), rng)
    try:
        images = sample(folder)
    except (ValueError, OSError):
        table.add("an export damaged at any place", "refused")
        return
    except Exception as error:
        table.add("an export damaged at any place", "traceback", f"{how}: {error!r}")
        return
    table.add("an export damaged at any place", "right" if images == sample(world / "export") else "lost", how)


def sample(folder: Path) -> list[bytes]:
    """Pixels of one image of an exported folder."""
    logging.disable_progress_bar()
    pipeline = EMFPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(["a photo of a red circle"], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    return [image.tobytes() for image in made.images]
