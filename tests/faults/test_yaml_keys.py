"""A key that stands twice in a YAML file is an error: the parser would drop the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from emf_lightning.cli import main
from emf_lightning.cli.parsing.experiment_files import check_keys, config_files, expand

TWICE = {
    "without a colon": ("{steps, batch, steps}", "steps", 1, 1),
    "at the top": ("trainer: {max_steps: 1}\ndata: {}\ntrainer: {max_steps: 2}\n", "trainer", 1, 3),
    "below": ("trainer:\n  max_steps: 1\n  precision: 32\n  max_steps: 2\n", "max_steps", 2, 4),
    "in a list": ("trainer:\n  callbacks:\n    - class_path: A\n      class_path: B\n", "class_path", 3, 4),
    "in braces": ("data: {shards: a,\n  shards: b}\n", "shards", 1, 2),
    "quoted": ("data:\n  'shards': a\n  shards: b\n", "shards", 2, 3),
    "appended": ("trainer:\n  callbacks+: [a]\n  callbacks+: [b]\n", "callbacks+", 2, 3),
    "in an anchor": ("a: &one\n  x: 1\n  x: 2\nb: *one\n", "x", 2, 3),
    "a number": ("a:\n  1: x\n  1: y\n", "1", 2, 3),
    "equal values": ("seed_everything: 1\nseed_everything: 1\n", "seed_everything", 1, 2),
}
DOTTED = {
    "inside and dotted": "trainer: {max_steps: 1}\ntrainer.max_steps: 2\n",
    "dotted first": "trainer.max_steps: 2\ntrainer: {max_steps: 1}\n",
    "another value below": "trainer: {max_steps: 1}\ntrainer.precision: 32\n",
    "two dots": "model.init_args.net: {}\nmodel.init_args: {net: {}}\n",
    "below": "model:\n  init_args.net: {}\n  init_args: {}\n",
    "appended": "trainer.callbacks+: [a]\ntrainer: {}\n",
}
ONCE = [
    "",
    "{}",
    "a: {x: 1}\nb: {x: 2}\n",
    "a: &one {x: 1, y: 2}\nb: {<<: *one, x: 3}\n",
    "a: &one {x: 1}\nc: &two {y: 1}\nb:\n  <<: *one\n  <<: *two\n",
    "a: &one [1, *one]\n",
    "a: &one {b: *one}\n",
    "a:\n  1: x\n  '1': y\n",
    "- {x: 1}\n- {x: 2}\n",
    "trainer.max_steps: 1\ntrainer.precision: 32\n",
    "a.b: 1\na.bc: 2\nab: 3\n",
    "1: x\n1.5: y\n",
]


@pytest.mark.parametrize("case", TWICE)
def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path, case):
    text, key, first, second = TWICE[case]
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    said = f"experiment.yaml: the key '{key}' is there twice, in line {first} and in line {second}"
    with pytest.raises(ValueError) as error:
        config_files(file)
    assert said in str(error.value)


@pytest.mark.parametrize("case", DOTTED)
def test_a_dotted_key_beside_the_one_that_it_is_about_is_named(case):
    with pytest.raises(ValueError, match=r"experiment.yaml: the keys '.*' in line \d and '.*' in line \d are about"):
        check_keys(DOTTED[case], "experiment.yaml")


@pytest.mark.parametrize("text", ONCE)
def test_keys_that_stand_once_are_fine(text):
    check_keys(text, "experiment.yaml")


@pytest.mark.parametrize("verb", ["fit", "test", "plan", "score"])
@pytest.mark.parametrize("where", ["the file", "its base", "an overlay", "a text"])
def test_every_verb_says_it_in_one_line(tmp_path, monkeypatch, capsys, verb, where):
    monkeypatch.chdir(tmp_path)
    good, bad = "data: {batch_size: 1}\n", "data:\n  batch_size: 1\n  batch_size: 2\n"
    Path("base.yaml").write_text(bad if where == "its base" else good)
    Path("one.yaml").write_text("base: base.yaml\n" + (bad if where == "the file" else good))
    Path("over.yaml").write_text(bad if where == "an overlay" else good)
    text = ["--config", bad] if where == "a text" else []
    with pytest.raises(SystemExit) as end:
        main([verb, "--config", "one.yaml", "--config", "over.yaml", *text])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "the key 'batch_size' is there twice" in said
    assert said.count("\n") == 1


def test_the_config_of_a_run_folder_is_read_alike(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("data: {}\ndata: {}\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step=1.ckpt").touch()
    with pytest.raises(SystemExit):
        main(["export", "--run", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "config.yaml: the key 'data' is there twice, in line 1 and in line 2" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["\x00", "[", "a: [1\n", "%", "{" * 5000])
def test_a_damaged_file_is_one_line(tmp_path, text):
    (tmp_path / "one.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"one\.yaml"):
        expand(["fit", "--config", str(tmp_path / "one.yaml")])


@pytest.mark.parametrize(
    "text",
    [
        "{data: bad.yaml}",
        "{data: {text: bad.yaml}}",
        "{trainer: bad.yaml}",
        pytest.param("{model: {init_args: {net: bad.yaml}}}", marks=pytest.mark.slow),
        pytest.param("{trainer: {callbacks: [bad.yaml]}}", marks=pytest.mark.slow),
    ],
)
def test_a_file_that_a_value_names_is_checked_alike(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("class_path: WordEncoder\nclass_path: SanaFlowMap\n")
    Path("one.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["plan", "--config", "one.yaml"])
    assert "bad.yaml: the key 'class_path' is there twice, in line 1 and in line 2" in capsys.readouterr().err
