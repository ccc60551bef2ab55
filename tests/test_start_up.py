"""What a verb imports before it does anything."""

import json
import subprocess
import sys
from functools import cache

import pytest

from emf_lightning.evaluation.metric_scores import MetricScores
from emf_lightning.evaluation.sampling_config import SamplingConfig
from emf_lightning.evaluation.score_history import ScoreHistory, ScoreRecord

HEAVY = {"torch", "torchmetrics", "torchvision", "transformers", "scipy", "lightning", "diffusers", "matplotlib"}
PROGRAM = """
import json, sys
from emf_lightning.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(set(sys.modules))))
"""


@cache
def help_of(verb: str) -> str:
    """A verb's help from a process of its own, and its modules in the last line."""
    asked = [sys.executable, "-c", PROGRAM, verb, "--help"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("verb", "needed"),
    [
        ("report", set()),
        ("plan", set()),
        ("export", set()),
        ("cache", set()),
        ("encoders", {"torch"}),  # an encoder is a torch module, and the help lists those that there are
    ],
)
def test_the_help_of_a_verb_loads_no_library_that_it_does_not_need(verb, needed):
    *text, modules = help_of(verb).splitlines()
    assert f"usage: emf {verb}" in "\n".join(text)
    assert HEAVY & set(json.loads(modules)) == needed


def test_an_experiment_that_is_not_there_is_told_before_any_library_is_loaded():
    asked = [sys.executable, "-c", PROGRAM.replace("not end.code", "end.code == 2"), "fit", "--config", "nowhere.yaml"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert "nowhere.yaml: no such file" in done.stderr
    assert HEAVY.isdisjoint(json.loads(done.stdout.splitlines()[-1]))


def test_a_report_of_scores_loads_neither_torch_nor_torchmetrics(tmp_path):
    numbers = {"clip": MetricScores("CLIP", "score", {"score": 0.5})}
    record = ScoreRecord("shapes", "fit", 4, SamplingConfig(1), nfe=1, seconds=1.0, metrics=numbers, images=6)
    (tmp_path / "run" / "shapes").mkdir(parents=True)
    ScoreHistory([record]).write(tmp_path / "run" / "shapes" / "scores.jsonl")
    asked = [sys.executable, "-c", PROGRAM, "report", str(tmp_path / "run"), "--out", str(tmp_path / "report")]
    *_, modules = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    assert (HEAVY - {"matplotlib"}).isdisjoint(json.loads(modules))
    assert "images of shapes world" in (tmp_path / "report" / "report.md").read_text()


def test_the_help_of_encoders_knows_every_corpus():
    text = "".join(help_of("encoders").split())
    for name in ("pair_corpus.CocoPairs", "own_pairs.OwnPairs"):
        assert f"emf_lightning.evaluation.encoders.{name}" in text
