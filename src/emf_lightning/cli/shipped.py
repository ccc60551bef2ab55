"""The experiments that this package ships, by name: ``shapes/demo`` is ``experiments/shapes/demo.yaml``."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

FOLDER = "experiments"

SHIPPED = (Path(__file__).resolve().parents[1] / FOLDER).resolve()  # in the repository a link to its experiments/


def experiment_file(name: str | Path, folder: Path = Path()) -> Path | None:
    """The file of an experiment, with or without ``.yaml`` and ``experiments/``; None if there is none.

    A path from ``folder`` wins over a name below the current directory's ``experiments/``, and that over the package's.
    """
    wanted = Path(name).expanduser()
    places = [folder / wanted]
    if (inside := _inside(wanted)) is not None:
        places += [Path(FOLDER, inside), SHIPPED / inside]
    return next((file for place in places for file in (place, Path(f"{place}.yaml")) if file.is_file()), None)


def shipped_path(name: str | Path) -> Path:
    """The place of an experiment in the package, whatever lies below the current directory; else ``name``."""
    inside = _inside(Path(name))
    return SHIPPED / inside if inside is not None else Path(name)


def named_experiments(argument: str, names: list[Path]) -> list[Path]:
    """The files of the experiments that ``argument`` names.

    Raises:
        ValueError: if there is none of that name.
    """
    files = []
    for name in names:
        file = experiment_file(name)
        if file is None:
            raise ValueError(f"{argument}: no file {name}{unknown(name)}")
        files.append(file)
    return files


def shipped_names() -> list[str]:
    """Names of the package's experiments, without ``.yaml``."""
    return sorted(file.relative_to(SHIPPED).with_suffix("").as_posix() for file in SHIPPED.glob("*/*.yaml"))


def unknown(name: str | Path) -> str:
    """The end of a message about an experiment that is not there: the nearest of the package's."""
    names = shipped_names()
    short = Path(_inside(Path(name)) or name).as_posix().removesuffix(".yaml")
    near = [one for one in names if one.endswith(f"/{Path(short).name}")] or get_close_matches(short, names, n=1)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return f", and no experiment of that name is shipped{meant} (`emf experiments` lists them)"


def with_shipped_files(value: Any) -> Any:
    """``value`` of a configuration, where each path to a file below ``experiments/`` that is not here is the package's.

    Folders count if they hold a model. The saved configuration keeps the short path, which is right on every machine.
    """
    if isinstance(value, Namespace):
        changed = value.clone()
        for key, inner in vars(value).items():
            vars(changed)[key] = with_shipped_files(inner)
        return changed
    if isinstance(value, dict):
        return {key: with_shipped_files(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_shipped_files(inner) for inner in value)
    if isinstance(value, (str, Path)) and Path(value).parts[:1] == (FOLDER,) and not Path(value).exists():
        shipped = SHIPPED / (_inside(Path(value)) or "")
        if shipped.is_file() or (shipped / "config.json").is_file():
            return type(value)(shipped)
    return value


def _inside(path: Path) -> Path | None:
    """``path`` from the folder of experiments; None if it leads out of it."""
    if path.is_absolute() or ".." in path.parts:
        return None
    return path.relative_to(FOLDER) if path.parts[:1] == (FOLDER,) else path
