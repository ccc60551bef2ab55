"""Files of weights with a variant such as ``fp16`` in their names, as diffusers writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from emf_lightning.files import read_json

_NAME = re.compile(
    r"(?P<stem>[^.]+?)(\.(?P<early>[\w-]+?))?(?P<shard>-\d{5}-of-\d{5})?"
    r"(?P<suffix>\.safetensors(\.index(?P<late>\.[\w-]+)?\.json)?)"
)


def variant_names(folder: Path, variant: str) -> None:
    """Puts ``variant`` into the names of the folder's safetensors, and of the index of sharded ones.

    Raises:
        ValueError: for a variant that cannot be a part of a file's name.
    """
    if not re.fullmatch(r"\w+", variant):
        raise ValueError(f"variant: {variant!r} must be letters and digits alone, e.g. fp16")
    for file in list(folder.iterdir()):
        new = _renamed(file.name, variant)
        if new.endswith(".json") and new != file.name:
            file.write_text(_index(file, variant))
        file.rename(folder / new)


@contextmanager
def plain_names(folder: Path, variant: str | None) -> Iterator[Path]:
    """A context with ``folder``, or with a folder of links in which the weights of ``variant`` have the plain names."""
    if variant is None:
        yield folder
        return
    with TemporaryDirectory() as name:
        for file in folder.resolve().iterdir():
            plain, weights = _renamed(file.name, None), bool(_NAME.fullmatch(file.name))
            if weights and _renamed(plain, variant) != file.name:
                continue  # of another variant
            if weights and plain.endswith(".json"):
                (Path(name) / plain).write_text(_index(file, None))
            else:
                (Path(name) / plain).symlink_to(file)
        yield Path(name)


def _renamed(name: str, variant: str | None) -> str:
    """The name of a file of weights with another variant, or none; other names as they are."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    shard, dotted = match["shard"] or "", f".{variant}" if variant else ""
    if match["suffix"].endswith(".json"):
        return f"{match['stem']}.safetensors.index{dotted}.json"
    return f"{match['stem']}{dotted}{shard}.safetensors"


def _index(file: Path, variant: str | None) -> str:
    """The index of sharded weights whose files have another variant in their names, or none."""
    index = read_json(file, "write it again")
    index["weight_map"] = {key: _renamed(name, variant) for key, name in index["weight_map"].items()}
    return json.dumps(index, indent=2) + "\n"
