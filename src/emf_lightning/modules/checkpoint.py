"""What can be said about a Lightning checkpoint before, and instead of, loading it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MISMATCH = re.compile(r"size mismatch for (\S+): .*?shape (\S+\(\[.*?\]\)) from checkpoint, .*?(\S+\(\[.*?\]\))")
_KEYS = re.compile(r"(Missing|Unexpected) key\(s\) in state_dict: (.*)")


def read_checkpoint(path: str | Path, argument: str) -> dict[str, Any]:
    """The checkpoint in the file at ``path``; its tensors are on the CPU, and read from the file when they are used.

    Raises:
        ValueError: where there is no such file, or it holds something else; the message begins with ``argument``.
    """
    import torch

    remedy = "give the path of a .ckpt file that `emf fit` wrote"
    if not Path(path).is_file():
        raise ValueError(f"{argument}: no checkpoint at {path}; {remedy}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds, according to which bytes are wrong
        raise ValueError(
            f"{argument}: {path} cannot be read as a checkpoint ({type(error).__name__}), it is something else or was "
            f"cut short; {remedy}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{argument}: {path} holds no model's weights; {remedy}")
    return checkpoint


def disagreement(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """The first thing that both speak of and on which they differ, in words."""
    names = (name for name in ours if name in theirs and theirs[name] != ours[name])
    return next((f"its {name} is {theirs[name]}, not {ours[name]}" for name in names), None)


def first_difference(error: RuntimeError) -> str:
    """The first of the differences that ``load_state_dict`` complains of, and how many more there are."""
    differences = []
    for line in map(str.strip, str(error).splitlines()[1:]):
        if mismatch := _MISMATCH.search(line):
            differences.append(f"{mismatch[1]} is {mismatch[2]} there and {mismatch[3]} here")
        elif keys := _KEYS.search(line):
            there, here = ("is not there", "here") if keys[1] == "Missing" else ("is there", "not here")
            differences += [f"{name} {there} but {here}" for name in re.findall(r'"(.+?)"', keys[2])]
        elif line:
            differences.append(line)
    more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
    return " ".join((differences or [str(error)])[0].split()) + more
