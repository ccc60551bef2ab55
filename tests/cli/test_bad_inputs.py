"""Files and options that are missing, damaged or of another kind: one sentence, and nothing in place of a result."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

from emf_lightning.cli import main
from tests.cli.world import CHECKPOINT, complaint

RUN = "runs/tiny/version_0"


def quick(count: int, cases: list[Any]) -> list[Any]:
    """All ``cases``, of which the first ``count`` are quick ones."""
    late = [case if isinstance(case, tuple) else (case,) for case in cases[count:]]
    return [*cases[:count], *(pytest.param(*case, marks=pytest.mark.slow) for case in late)]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def changed(change: dict[str, Any], *left_out: str) -> str:
    """A copy of the run's checkpoint with other contents."""
    content = torch.load(CHECKPOINT, weights_only=True) | change
    for key in left_out:
        del content[key]
    torch.save(content, "changed.ckpt")
    return "changed.ckpt"


@pytest.mark.parametrize(
    ("change", "left_out", "said"),
    quick(
        3,
        [
            ({}, ("pytorch-lightning_version",), "'pytorch-lightning_version'"),
            ({"pytorch-lightning_version": "x.y"}, (), "Invalid version"),
            ({}, ("optimizer_states",), "optimizer state"),
            ({"optimizer_states": []}, (), "IndexError"),
            ({"optimizer_states": ["x"]}, (), "does not hold what a training saves"),
            ({"global_step": None, "loops": {}}, (), "'fit_loop'"),
            ({"callbacks": [1]}, (), "does not hold what a training saves"),
            ({"flow_map": [1]}, (), "does not hold what a training saves"),
            ({"state_dict": {1: torch.zeros(2)}}, (), "holds no model's weights"),
        ],
    ),
)
def test_a_checkpoint_that_is_none_of_a_training_is_named(capsys, change, left_out, said):
    options = ("--config", "shapes/child.yaml", "--trainer.max_steps", "3", "--ckpt_path", changed(change, *left_out))
    line = complaint(capsys, "fit", *options)
    assert line.startswith("emf fit: ckpt_path: changed.ckpt ") and said in line


# -- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "2024-13-45",  # a month 13
        "!!int x",
        "!!timestamp x",
        "!!bool x",
        "!!float x",
        "!!int ''",
        "[" * 5000,
        "{\n",
    ],
)
def test_a_file_whose_value_is_not_what_its_tag_says_is_no_yaml(capsys, tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(f"seed_everything: {text}\n")
    assert f"{file}: no valid YAML: " in complaint(capsys, "fit", "--config", str(file))


def test_a_value_that_holds_itself_is_refused(capsys, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("trainer: &a\n  callbacks: *a\n")
    assert "holds itself" in complaint(capsys, "fit", "--config", str(file))


@pytest.mark.parametrize("word", quick(1, ["2024-13-45", "[" * 5000, "!!timestamp x"]))
def test_a_prompt_that_is_no_yaml_is_a_prompt(tmp_path, word):
    main(["predict", "--run", RUN, "--trust_remote_code", "--prompt", word, "--steps", "1", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.parametrize("value", quick(1, ["null", "3", "a"]))
@pytest.mark.parametrize("section", ["trainer", "data", "model"])
def test_a_section_that_holds_no_settings_is_named(capsys, section, value):
    line = complaint(capsys, "plan", "base.yaml", "--config", f"{{{section}: {value}}}")
    assert section in line.partition("emf plan: ")[2]


# -- published weights ------------------------------------------------------------------------------------------------

BLIP3O = '{"model_type": "blip3o"}'


@pytest.mark.parametrize(
    ("files", "said"),
    quick(
        2,
        [
            ({"config.json": "[]"}, "config.json holds no JSON object"),
            ({"config.json": "{"}, "config.json cannot be read as JSON"),
            ({"config.json": "[" * 100_000}, "config.json cannot be read as JSON"),
            ({"config.json": '{"num_layers": "x"}'}, "cannot load"),
            ({"config.json": BLIP3O, "model.safetensors.index.json": "{}"}, "its weight_map names no files"),
            ({"config.json": BLIP3O, "model.safetensors.index.json": "["}, "cannot be read as JSON"),
            (
                {"config.json": BLIP3O, "model.safetensors.index.json": '{"weight_map": {"model.sana.a": 3}}'},
                "weight_map",
            ),
        ],
    ),
)
def test_damaged_files_of_published_weights_are_named(capsys, tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    weights = f"{{model: {{init_args: {{net: {{init_args: {{pretrained: {tmp_path}, architecture: null}}}}}}}}}}"
    assert said in complaint(capsys, "fit", "--config", "base.yaml", "--config", weights)


# -- comparisons ------------------------------------------------------------------------------------------------------


def test_two_experiments_of_one_name_are_not_taken_for_one(capsys, tmp_path):
    shutil.copy("base.yaml", tmp_path / "base.yaml")
    line = complaint(
        capsys, "compare", "base.yaml", str(tmp_path / "base.yaml"), "--steps", "2", "--out", str(tmp_path)
    )
    assert "two have the name base" in line


@pytest.mark.parametrize(("option", "value"), [("seeds", "1"), ("overlays", "base.yaml")])
def test_one_value_of_a_list_is_told_how_a_list_is_written(capsys, tmp_path, option, value):
    line = complaint(capsys, "compare", "base.yaml", "--steps", "2", "--out", str(tmp_path), f"--{option}", value)
    assert option in line and line.endswith("a list is written [A, B], with one value [A]")


@pytest.mark.parametrize(("verb", "flag"), [("cache", "dry_run"), ("plan", "trust_remote_code")])
def test_a_flag_with_a_value_is_told_that_it_takes_none(capsys, verb, flag):
    line = complaint(capsys, verb, "base.yaml", f"--{flag}=true")
    assert f"--{flag} takes no value" in line


def test_a_plan_of_a_run_that_is_not_there_is_refused(capsys):
    assert "nowhere is not there" in complaint(capsys, "plan", "base.yaml", "--run", "nowhere")


@pytest.mark.parametrize("empty", ["experiments", "seeds"])
def test_a_comparison_of_nothing_is_refused(capsys, tmp_path, empty):
    (tmp_path / "comparison.md").write_text("of an earlier call")
    options = {"experiments": "[base.yaml]", "seeds": "[0]"} | {empty: "[]"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    line = complaint(capsys, "compare", *words, "--steps", "2", "--out", str(tmp_path))
    assert line == f"emf compare: {empty}: the list is empty; give at least one"


@pytest.mark.parametrize("summary", ["{", "{}", '{"step_seconds": 0}', '{"step_seconds": "x"}'])
def test_a_damaged_measurement_of_speed_is_named(capsys, tmp_path, summary):
    folder = tmp_path / "base" / "calibration"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(summary)
    line = complaint(capsys, "compare", "base.yaml", "--minutes", "1", "--out", str(tmp_path))
    assert f"{folder / 'summary.json'}" in line and line.endswith("delete its folder and repeat")


# -- what lies in a run's directory -----------------------------------------------------------------------------------


def test_a_row_of_metrics_that_a_kill_has_torn_is_left_out(tmp_path):
    shutil.copytree(RUN, tmp_path / "version_0")
    (tmp_path / "version_0/metrics.csv").write_text("loss,step\n0.5,1\n,x\n0.25")
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": "version_0"}}
    run = ("--run", str(tmp_path / "version_0"), "--trainer.logger", json.dumps(logger), "--trainer.max_steps", "3")
    main(["fit", *run, "--trainer.log_every_n_steps", "1"])
    rows = (tmp_path / "version_0/metrics.csv").read_text().splitlines()
    assert rows[0].split(",")[:2] == ["loss", "step"] or "loss" in rows[0]
    assert any("0.5" in row for row in rows) and not any("0.25" in row for row in rows)


RESULTS = ['{"prompt": "a', "[1]\n", '{"prompt": 3}\n', '{"prompt": "a", "tag": [1]}\n', "\0"]


@pytest.mark.parametrize("text", quick(1, RESULTS))
def test_an_export_goes_without_examples_that_cannot_be_read(tmp_path, text):
    shutil.copytree(RUN, tmp_path / "run")
    (tmp_path / "run/shapes/results").mkdir(parents=True)
    (tmp_path / "run/shapes/results/step1.jsonl").write_text(text)
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/model_index.json").is_file()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--samples_per_shard=0", "samples_per_shard must be at least 1"),
        ("--seed=-1", "seed must not be negative, got -1"),
        ("--workers=-1", "workers must not be negative, got -1"),
    ],
)
def test_numbers_of_shards_out_of_range_are_refused(capsys, tmp_path, option, said):
    assert said in complaint(capsys, "shards", "--out", str(tmp_path), option)


@pytest.mark.parametrize("content", [b"\xff\x00", b"a: [", b"seed_everything: 2024-13-45\n"])
@pytest.mark.parametrize("verb", ["compare", "claim"])
def test_damaged_settings_of_earlier_trainings_are_named(capsys, tmp_path, verb, content):
    file = tmp_path / ("base/steps2-seed0/compared.yaml" if verb == "compare" else "trained-meanflow.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    options = {"compare": ["base.yaml", "--steps", "2"], "claim": ["--seeds", "[0]"]}[verb]
    assert str(file) in complaint(capsys, verb, *options, "--out", str(tmp_path))
