"""Help, examples, the schema of experiment files, and the shell's completion."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from emf_lightning.cli import main
from emf_lightning.cli.schema import file_schema
from emf_lightning.cli.verbs import EXAMPLES, EXPERIMENT_VERBS, FUNCTION_VERBS, TRAINER_VERBS

ROOT = Path(__file__).resolve().parents[2]
VERBS = [*TRAINER_VERBS, *EXPERIMENT_VERBS, *FUNCTION_VERBS]
FILES = sorted((ROOT / "experiments").rglob("*.yaml"))


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with suppress(SystemExit):
        main(arguments)
    out, err = capsys.readouterr()
    assert "emf " not in err, err
    return out


def test_help_opens_with_our_own_options(capsys) -> None:
    text = output(capsys, "fit", "--help")
    options = r"-c\b", r"--run\b", r"--model", r"--data\.text", r"--trainer\."
    places = [text.index("examples:"), *(re.search(rf"^ +{option}", text, re.M).start() for option in options)]
    assert places == sorted(places)
    assert text.startswith("usage: emf fit ")


@pytest.fixture(scope="module")
def home(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the paths of the examples are there."""
    path = tmp_path_factory.mktemp("examples")
    (path / "experiments").symlink_to(ROOT / "experiments")
    for name in ("demo", "emf"):
        shutil.copytree(world / "runs/tiny/version_0", path / f"runs/shapes/{name}/version_0")
    (path / "prompts.txt").write_text("a red circle\n")
    return path


@pytest.mark.slow  # each verb imports its own modules, and parses an experiment twice
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "experiments"])  # which takes no options
def test_each_example_of_a_verb_is_in_its_help_and_parses(capsys, home, monkeypatch, verb) -> None:
    monkeypatch.chdir(home)
    text = output(capsys, verb, "--help")
    assert len(EXAMPLES[verb]) == 2
    for example in EXAMPLES[verb]:
        assert example in text
        emf, *arguments = shlex.split(example.replace("*.yaml", "emf.yaml"))
        assert emf == "emf" and arguments[0] == verb
        assert ":" in output(capsys, *arguments, "--print_config")


# -- schema -----------------------------------------------------------------------------------------------------------


@cache
def validator(verb: str) -> jsonschema.Draft202012Validator:
    schema = file_schema(verb)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def mistakes(document: Any, verb: str = "fit") -> list[str]:
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator(verb).iter_errors(document)
    ]


def verb_of(file: Path) -> str:
    return {"encoders": "encoders", "scores": "score"}.get(file.parent.name, "fit")


@pytest.mark.slow
def test_every_shipped_file_and_a_runs_config_have_no_mistakes(world) -> None:
    found = {str(file): mistakes(yaml.safe_load(file.read_text()), verb_of(file)) for file in FILES}
    found["run"] = mistakes(yaml.safe_load((world / "runs/tiny/version_0/config.yaml").read_text()))
    assert {file: errors[:2] for file, errors in found.items() if errors} == {}
    assert len(found) > 40


GOOD = [
    "trainer: {max_steps: '${a.b}', callbacks-: [A], callbacks+: [SampleWriter]}",
    "trainer: {logger-: A}",
    "base: [a, b]",
    "data: {text: my.Own, batch_size: '${trainer.x}'}",
    "data: {text: {class_path: my.Own, init_args: {anything: 1}}}",
    "model: FGM",
    "seed_everything: true",
    "model: {init_args: {optimization: {scheduler: {init_args: {total: '${trainer.max_steps}'}}}}}",
]


@pytest.mark.slow  # the schema takes some 20 s
@pytest.mark.parametrize("text", GOOD)
def test_what_files_may_hold_is_allowed(text) -> None:
    assert mistakes(yaml.safe_load(text)) == []


BAD = [
    "trainer: {max_stpes: 3}",
    "trainer: {max_steps: many}",
    "trainer: {callbacks-: 3}",
    "trainer: {callbacks: [{class_path: SampleWriter, init_args: {stps: [1]}}]}",
    "trainer: {callbacks+: [{class_path: SampleWriter, init_args: {stps: [1]}}]}",
    "trainer: {callbacks: [{class_path: RunSummary, init_args: {suite: {class_path: ShapesSuit}}}]}",
    "trainer: {logger: {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {nam: x}}}",
    "modle: {}",
    "base: 3",
    "data: {batch_size: big}",
    "data: {text: WrodEncoder}",
    "data: {text: {class_path: WordEncoder, init_args: {widht: 1}}}",
    "data: {text: {init_args: {widht: 1}}}",
    "model: {init_args: {caption_dropuot: 0}}",
    "model: {init_args: {objective: 3}}",
    "model: {init_args: {objective: MeanFloww}}",
    "model: {init_args: {objective: {class_path: MeanFlow, init_args: {tiems: UniformTimes}}}}",
    "model: {init_args: {objective: {init_args: {times: UniformTime}}}}",
    "model: {class_path: FGN}",
    "model: {init_args: {net: {class_path: SanaFlowMap, init_args: {architecture: {num_layer: 1}}}}}",
    "model: {class_path: FlowMapModule, init_args: {objective: {init_args: {times: UniformTime}}}}",
    "model: {init_args: {optimization: {scheduler: {class_path: WarmupCosine, init_args: {totl: 1}}}}}",
    "model: {init_args: {optimization: {optimizer: {class_path: torch.optim.AdamW, init_args: {lrr: 1}}}}}",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", BAD)
def test_a_misspelling_is_flagged(text) -> None:
    assert mistakes(yaml.safe_load(text)) != []


def test_the_schema_is_written_to_a_file_that_an_experiment_names(capsys, tmp_path) -> None:
    said = output(capsys, "schema", "encoders", "--out", str(tmp_path / "a/schema.json"))
    assert f"# yaml-language-server: $schema={tmp_path}/a/schema.json" in said
    assert json.loads((tmp_path / "a/schema.json").read_text()) == file_schema("encoders")


# -- completion -------------------------------------------------------------------------------------------------------


def test_bash_completes_verbs_options_and_files(capsys, tmp_path) -> None:
    (tmp_path / "emf.bash").write_text(output(capsys, "completion", "bash"))
    (tmp_path / "experiment.yaml").touch()

    def completed(*words: str) -> list[str]:
        state = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}"
        line = f"source emf.bash; {state}; _emf; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("emf", "va") == ["validate"]
    assert completed("emf", "predict", "--prom") == ["--prompt", "--prompts"]
    assert completed("emf", "cache", "--dry") == ["--dry_run"]
    assert completed("emf", "fit", "--trainer.max_st") == ["--trainer.max_steps"]
    assert completed("emf", "fit", "exp") == ["experiment.yaml"]
