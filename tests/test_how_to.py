"""The examples of docs/how_to run as they are written, on a tiny experiment."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from emf_lightning.cli import main
from tests.cli.world import BASE


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with shards, an experiment, tiny.yaml, and scored.yaml: MeanFlow, scored at one network step."""
    monkeypatch.chdir(tmp_path)
    main(["shards", "--out", "shards", "--count", "32", "--samples_per_shard", "16"])
    Path("tiny.yaml").write_text(BASE)
    suite = {"class_path": "ShapesSuite", "init_args": {"world": "small", "per_task": 2, "scenes_per_task": 2}}
    scores = {"class_path": "FewStepSampling", "init_args": {"suite": suite, "steps": [1], "every_n_steps": 2}}
    settings = yaml.safe_load(BASE)
    parts = {"guidance": {"scale": 1.0}, "times": {"class_path": "LogitNormalTimes"}}
    settings["model"]["init_args"]["objective"] = {"class_path": "MeanFlow", "init_args": parts}
    settings["trainer"]["callbacks"].append(scores)
    Path("scored.yaml").write_text(yaml.safe_dump(settings))


def blocks(root: Path, page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (root / "docs/how_to" / page).read_text(), re.DOTALL | re.MULTILINE
    )


def test_a_profile_is_written_into_the_run(root: Path) -> None:
    profiler, snapshot = blocks(root, "profile.md", "yaml")
    Path("profile.yaml").write_text(f"base: tiny.yaml\n{profiler}")
    Path("snapshot.yaml").write_text(snapshot)

    main(["fit", "--config", "profile.yaml", "--config", "snapshot.yaml", "--trainer.max_steps", "3"])

    run = Path("runs/tiny/version_0")
    assert "CPU Mem" in (run / "fit-profile.txt").read_text()
    assert len([*run.glob("fit-profile*.json")]) == 1


@pytest.mark.slow
def test_the_sweep_trains_and_keeps_the_best_of_its_trials(root: Path) -> None:
    optuna = pytest.importorskip("optuna")
    (code,) = blocks(root, "sweeps.md", "python")
    for given, tiny in (('"shapes/emf", 300', '"scored.yaml", 2'), ("n_trials=20", "n_trials=1")):
        assert given in code
        code = code.replace(given, tiny)
    Path("sweep.py").write_text(code)

    for total in (1, 2):  # the second call goes on
        subprocess.run([sys.executable, "sweep.py"], check=True)
        study = optuna.load_study(study_name="emf", storage="sqlite:///sweep.db")
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * total
    configs = [yaml.safe_load(Path(f"runs/sweep/trial_{n}/config.yaml").read_text()) for n in range(2)]
    scales = [config["model"]["init_args"]["objective"]["init_args"]["guidance"]["scale"] for config in configs]
    assert scales == [trial.params["guidance"] for trial in study.trials]
