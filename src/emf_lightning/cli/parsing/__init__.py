"""Experiment files, the parser, and its errors."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pkgutil import walk_packages


def import_classes(*packages: str) -> None:
    """Imports all modules of ``packages``: the parser resolves short names of imported classes only."""
    with without_collection():
        for package in packages:
            path = import_module(f"emf_lightning.{package}").__path__
            for module in walk_packages(path, f"emf_lightning.{package}."):
                import_module(module.name)


@contextmanager
def without_collection(keep: bool = False) -> Iterator[None]:
    """A context for imports, in which nothing looks for garbage: all that they create stays.

    Args:
        keep: later collections leave out all that there is by then, for a process that is the command line's alone.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if keep:
                gc.freeze()
                atexit.register(gc.unfreeze)  # else triton reports at the end what Python has not freed
            gc.enable()
