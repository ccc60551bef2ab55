"""What the experiments of published size set, read from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from emf_lightning.cli.parsing.experiment_files import config_files

ROOT = Path(__file__).resolve().parent.parent

PUBLISHED = [
    str(path.relative_to(ROOT))
    for name in ("emf", "fgm", "meanflow", "scflow")
    for path in sorted((ROOT / "experiments" / name).glob("*.yaml"))
]


def settings_of(experiment: str) -> dict[str, Any]:
    """The merged values of an experiment and its bases, callbacks by their class."""
    merged: dict[str, Any] = {}
    for file in config_files(str(ROOT / experiment)):
        values = yaml.safe_load(file.read_text())
        trainer = values.get("trainer") or {}
        merged.setdefault("callbacks", {}).update(
            {one["class_path"]: one.get("init_args", {}) for one in trainer.get("callbacks+") or []}
        )
        merged.update({f"trainer.{name}": value for name, value in trainer.items()})
        data = values.get("data") or {}
        merged.update({f"data.{name}": value for name, value in data.items() if name != "cache"})
        merged.setdefault("cache", {}).update(data.get("cache") or {})
        encoder = ((data.get("text") or {}).get("init_args") or {}).get("model")
        merged["encoder"] = encoder or (data.get("text") or {}).get("class_path") or merged.get("encoder")
    return merged


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_its_rows_a_step_do_not_depend_on_the_machine(experiment: str) -> None:
    assert isinstance(settings_of(experiment)["trainer.devices"], int)


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_its_averages_forget_their_start(experiment: str) -> None:
    settings = settings_of(experiment)
    for name, arguments in settings["callbacks"].items():
        if name.endswith("WeightEMA") and not arguments.get("warmup"):
            assert arguments["decay"] ** settings["trainer.max_steps"] < 0.01


def test_every_encoder_has_a_cache_of_its_own() -> None:
    caches: dict[str, set[str]] = {}
    for experiment in PUBLISHED:
        settings = settings_of(experiment)
        if settings["cache"].get("path") and settings["cache"].get("max_gb"):
            caches.setdefault(settings["cache"]["path"], set()).add(settings["encoder"])
    assert len(caches) >= 4
    assert all(len(encoders) == 1 for encoders in caches.values()), caches
