"""Experiment files, the parser, and its errors."""

from __future__ import annotations

from importlib import import_module
from pkgutil import walk_packages


def import_classes(*packages: str) -> None:
    """Imports all modules of ``packages``: the parser resolves short names of imported classes only."""
    for package in packages:
        path = import_module(f"emf_lightning.{package}").__path__
        for module in walk_packages(path, f"emf_lightning.{package}."):
            import_module(module.name)
