"""What a verb imports before it does anything."""

import gc
import json
import subprocess
import sys

import pytest

from emf_lightning.cli import main
from emf_lightning.cli.parsing import without_collection
from emf_lightning.evaluation.metric_scores import MetricScores
from emf_lightning.evaluation.sampling_config import SamplingConfig
from emf_lightning.evaluation.score_history import ScoreHistory, ScoreRecord

HEAVY = {"torch", "torchmetrics", "torchvision", "transformers", "scipy", "lightning", "diffusers", "matplotlib"}
PROGRAM = """
import contextlib, io, json, sys
found, seen = [], set()
from emf_lightning.cli import main
for arguments in json.loads(sys.argv[1]):
    said, status = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code or 0
    found.append((status, said.getvalue(), sorted(set(sys.modules) - seen)))
    seen |= set(sys.modules)
print(json.dumps(found))
"""
NEEDED = {
    "nothing": set(),
    "report": set(),
    "plan": set(),
    "export": set(),
    "cache": set(),
    "compare": set(),
    "play": set(),
    "scores": {"matplotlib"},
    "encoders": {"torch"},  # an encoder is a torch module, and the help lists those that there are
}
"""What each call may load, in addition to those before it."""

Told = dict[str, tuple[int, str, set[str]]]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Told:
    """Status, words and newly loaded modules of each call, one after the other in a fresh process."""
    folder = tmp_path_factory.mktemp("run")
    numbers = {"clip": MetricScores("CLIP", "score", {"score": 0.5})}
    record = ScoreRecord("shapes", "fit", 4, SamplingConfig(1), nfe=1, seconds=1.0, metrics=numbers, images=6)
    (folder / "run/shapes").mkdir(parents=True)
    ScoreHistory([record]).write(folder / "run/shapes/scores.jsonl")
    calls = {verb: [verb, "--help"] for verb in NEEDED}
    calls["nothing"] = ["fit", "--config", "nowhere.yaml"]
    calls["scores"] = ["report", "run", "--out", "report"]
    asked = [sys.executable, "-c", PROGRAM, json.dumps([*calls.values()])]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=folder)
    found = {
        name: (status, said, set(modules))
        for name, (status, said, modules) in zip(calls, json.loads(done.stdout), strict=True)
    }
    assert "images of shapes world" in (folder / "report/report.md").read_text()
    return found


@pytest.mark.parametrize("verb", ["report", "plan", "export", "cache", "compare", "play", "encoders"])
def test_the_help_of_a_verb_loads_no_library_that_it_does_not_need(told, verb):
    status, text, modules = told[verb]
    assert status == 0
    assert f"usage: emf {verb}" in text
    assert HEAVY & modules == NEEDED[verb]


def test_an_experiment_that_is_not_there_is_told_before_any_library_is_loaded(told):
    status, said, modules = told["nothing"]
    assert status == 2
    assert "nowhere.yaml: no such file" in said
    assert HEAVY.isdisjoint(modules)


def test_a_report_of_scores_loads_neither_torch_nor_torchmetrics(told):
    status, _, modules = told["scores"]
    assert status == 0
    assert HEAVY & modules <= NEEDED["scores"]


def test_the_help_of_encoders_knows_every_corpus(told):
    text = "".join(told["encoders"][1].split())
    for name in ("pair_corpus.CocoPairs", "own_pairs.OwnPairs"):
        assert f"emf_lightning.evaluation.encoders.{name}" in text


def test_imports_are_not_searched_for_garbage_and_the_command_line_keeps_them(monkeypatch):
    kept: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: kept.append("frozen"))
    with without_collection(keep=True):
        with without_collection(keep=True):
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    assert kept == ["frozen"]
    with without_collection():
        pass
    assert kept == ["frozen"]


def test_a_call_from_python_keeps_no_garbage(monkeypatch, capsys):
    kept: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: kept.append("frozen"))
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert not kept
    monkeypatch.setattr(sys, "argv", ["emf", "report", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert kept == ["frozen"]
