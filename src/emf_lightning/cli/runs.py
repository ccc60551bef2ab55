"""A run by its name: `--run RUN` names its configuration, its last checkpoint and its directory.

torch and Lightning are imported where a run is looked at: an experiment's wrong name is told without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emf_lightning.cli.run_lock import LOCK

CONFIG = "config.yaml"
"""File of a run's whole configuration, in its directory."""

OPTION = "--run"


@dataclass(frozen=True)
class Run:
    """A run's directory and the checkpoint to use: the one that was named, or its last whole one, if it has any."""

    directory: Path
    checkpoint: Path | None


def find_run(run: str | Path) -> Run:
    """The run that ``run`` names: its directory, ``runs/<name>`` for its newest version, or one of its checkpoints.

    Raises:
        ValueError: for anything else.
    """
    from emf_lightning.cli.run_directory import versions

    path = Path(run).expanduser()  # which a shell leaves in `--run=~/runs/mine`
    for directory in (path, *versions(path)):
        if (directory / CONFIG).is_file():
            return Run(directory if directory.name not in ("", "..") else directory.resolve(), _last(directory))
    if path.exists() and (inside := run_of(path)) is not None:
        return Run(inside, path if path.suffix == ".ckpt" else _last(inside))
    what = f"no {CONFIG} in {path}" if path.exists() else f"{path} is not there"
    raise ValueError(f"run: {what}; give the directory of a run, e.g. runs/shapes/emf/version_0")


def run_of(path: str | Path) -> Path | None:
    """The directory of the run in which ``path`` lies, a checkpoint for example; None if it lies in none."""
    here, path = Path.cwd(), Path(path).absolute()
    for folder in list(path.parents)[:3]:
        saved = (folder / LOCK).is_file() or path.relative_to(folder).parts[0] == "checkpoints"
        if saved and (folder / CONFIG).is_file():
            return folder.relative_to(here) if folder != here and folder.is_relative_to(here) else folder
    return None


def _last(run: Path) -> Path | None:
    """The run's last checkpoint; where none has that name, the newest whole one, or a damaged one if all are."""
    from emf_lightning.modules.checkpoint_files import is_whole

    found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    lasts = [path for path in found if path.stem.startswith("last")]
    return next(iter(lasts), None) or next(filter(is_whole, found), found[0] if found else None)


def checkpoint_of(found: Run, name: str | Path | None = None) -> Path:
    """The checkpoint of a run, or that of a name or path: in its checkpoints, in its directory, or here.

    Raises:
        ValueError: for a run that has none, where it names an earlier version that has one, or none of this name.
    """
    from emf_lightning.cli.run_directory import versions

    if name is not None:
        folders = found.directory / "checkpoints", found.directory, Path()
        for path in (folder / name for folder in folders):
            if path.exists():
                return path
        there = ", ".join(sorted(path.name for path in folders[0].glob("*"))) or "none"
        raise ValueError(f"no checkpoint at {name}; {folders[0]} has {there}")
    if found.checkpoint is not None:
        return found.checkpoint
    others = [folder for folder in versions(found.directory.parent) if _last(folder) is not None]
    remedy = f"{others[0]} has one" if others else "train it first, or wait for its first checkpoint"
    raise ValueError(f"run: {found.directory} has no checkpoint; {remedy}")


def with_run(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with the configuration of ``--run RUN`` before all options, which win over it.

    Raises:
        ValueError: for a RUN that is no run.
    """
    verb, *options = arguments
    for number, word in enumerate(options):
        option, equals, value = word.partition("=")
        if option == OPTION:
            if not equals and number + 1 == len(options):
                raise ValueError(f"{OPTION}: names no run")
            found = find_run(value if equals else options[number + 1])
            return [verb, "--config", str(found.directory / CONFIG), *options]
    return list(arguments)
