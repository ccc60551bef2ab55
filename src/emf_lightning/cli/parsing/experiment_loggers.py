"""Names and places of an experiment's loggers, in its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from emf_lightning.cli.parsing.experiment_files import read_yaml


def experiment_name(trainer: Namespace) -> str | None:
    """Name of an experiment, e.g. ``shapes/emf``: its logger's, or ``default_root_dir`` without the folder of all runs.

    None where neither is set.
    """
    from emf_lightning.callbacks.loggers.run_directory import UNNAMED  # here: it loads Lightning

    for logger in _loggers(trainer):
        if (name := logger.get("init_args.name")) and name != UNNAMED:
            return str(name)
    parts = Path(trainer.get("default_root_dir") or "").parts
    return "/".join(parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else parts[-2:]) or None


def complete_loggers(trainer: Namespace) -> None:
    """Gives the experiment's name to loggers that take one, and MLflow a folder of its own beside the runs."""
    name = experiment_name(trainer)
    for logger in _loggers(trainer):
        settings = logger.get("init_args") or Namespace()  # type: ignore[no-untyped-call]
        for argument in ("name", "run_name"):
            if argument in settings and settings[argument] is None:
                settings[argument] = name
        if "tracking_uri" in settings and settings.tracking_uri is None:
            folder = Path(settings.save_dir or ".")
            settings.tracking_uri = f"file:{folder if folder.name == 'mlruns' else folder / 'mlruns'}"


def holds_settings(file: Path, content: str) -> bool:
    """Whether ``file`` has the settings ``content``, but for the run's place, which earlier versions wrote elsewhere.

    Raises:
        ValueError: for a file that is no YAML.
    """
    return bool(_without_place(read_yaml(file)) == _without_place(yaml.safe_load(content)))


def _without_place(settings: Any) -> Any:
    for part in settings if isinstance(settings, list) else [settings]:
        if isinstance(part, dict) and isinstance(trainer := part.get("trainer"), dict):
            for name in ("logger", "default_root_dir"):
                trainer.pop(name, None)
    return settings


def _loggers(trainer: Namespace) -> list[Namespace]:
    found = trainer.get("logger")
    return [logger for logger in (found if isinstance(found, list) else [found]) if isinstance(logger, Namespace)]
