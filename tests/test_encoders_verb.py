"""`emf encoders`, called in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from emf_lightning.cli import main
from emf_lightning.cli.encoders import _cached_features
from emf_lightning.evaluation.encoders.features import pooled_features
from emf_lightning.evaluation.shapes.pairs import ShapesPairs
from emf_lightning.text.base import TextFeatures
from emf_lightning.text.words import WordEncoder
from tests.evaluation.dpg.test_dpg_bench import write

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--corpus", "ShapesPairs", "--corpus.count", "150", "--queries", "40"]


def study(out, capsys, *options: str) -> dict:
    main(["encoders", *SMALL, "--out", str(out), *options])
    shown = capsys.readouterr().out
    assert max(map(len, shown.partition("encoders.md")[0].splitlines())) <= 100
    assert all(name in shown for name in ("discriminability", "constant (control)", "contrast"))
    return json.loads((out / "encoders.json").read_text())


@pytest.fixture
def config(tmp_path):
    words = {"class_path": "WordEncoder", "init_args": {"width": 64, "length": 10}}
    noisy = {"class_path": "DegradedEncoder", "init_args": {"noise": 3.0, "encoder": words}}
    path = tmp_path / "encoders.yaml"
    path.write_text(yaml.safe_dump({"encoders": {"words": words, "noisy": noisy}}, sort_keys=False))
    return str(path)


def test_noise_costs_discriminability_and_a_control_is_always_there(config, tmp_path, capsys):
    found = {e["name"]: e for e in study(tmp_path / "out", capsys, "--config", config)["encoders"]}

    assert list(found) == ["words", "noisy", "constant (control)"]
    raw = {name: e["discriminability"]["score"]["raw"]["mean"] for name, e in found.items()}
    assert raw["words"] > raw["noisy"] + 0.1 > raw["constant (control)"]
    assert found["constant (control)"]["disentanglement"]["ablated"]["raw"]["mean"] == pytest.approx(1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "encoders.json",
        "encoders.md",
        "encoders.png",
        "retrieved.png",
        "features",
    }
    assert "published" not in (tmp_path / "out/encoders.md").read_text()


def test_features_are_kept_for_the_next_study(config, tmp_path, capsys):
    first = study(tmp_path / "out", capsys, "--config", config)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").iterdir()}
    second = study(tmp_path / "out", capsys, "--config", config)

    assert len(kept) == 3
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").iterdir()}
    assert first["encoders"] == second["encoders"]


class Sampled(WordEncoder):
    """Features that depend on more than the fingerprint, as those of tokens that an encoder samples."""

    def __init__(self, variant_number: int) -> None:
        super().__init__(width=16, length=10)
        self.variant_number = variant_number

    @property
    def variant(self) -> str:
        return f"variant {self.variant_number}"

    def encode(self, captions):
        text = super().encode(captions)
        torch.manual_seed(self.variant_number)
        return TextFeatures(text.context + torch.randn(self.width), text.mask)


def test_features_of_another_variant_are_not_taken_for_its_own(tmp_path):
    out, corpus = tmp_path / "out", ShapesPairs(count=20)
    assert Sampled(0).fingerprint == Sampled(1).fingerprint
    for number in (0, 1, 0):
        kept, _ = _cached_features(out, Sampled(number), corpus, 64, lambda done, total: None)
        np.testing.assert_array_equal(kept, pooled_features(Sampled(number), corpus.captions))
    assert len(list((out / "features").iterdir())) == 2


def test_a_list_of_prompts_and_its_sentences_may_take_the_captions_place(config, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a red circle. a blue square number {i}. a ring.\n" for i in range(5)))
    about = study(tmp_path / "out", capsys, "--config", config, "--prompts", str(prompts), "--unit", "sentence")[
        "about"
    ]
    assert about["removal"] == "50% of the sentences of 5 prompts, seeds 0, 1, 2"


@pytest.mark.filterwarnings("ignore:.*is cut to length 6")
def test_captions_that_were_cut_are_counted_with_the_features_that_are_kept(tmp_path):
    out, corpus = tmp_path / "out", ShapesPairs(count=60)
    lengths = [len(caption.split()) for caption in dict.fromkeys(corpus.captions)]
    for _ in range(2):
        _, cut = _cached_features(out, WordEncoder(length=6), corpus, 64, lambda done, total: None)
        assert cut == pytest.approx(np.mean([length > 6 for length in lengths]))
        assert 0 < cut < 1


def test_the_papers_values_stand_beside_what_it_measured_alone(config, tmp_path, capsys):
    table = tmp_path / "dpg_bench.csv"
    texts = [f"a red circle. a blue square number {i}. a ring." for i in range(5)]
    write(table, [(f"item{i}", text, n, "0", "entity - whole", "?") for i, text in enumerate(texts) for n in (1, 2)])
    about = study(tmp_path / "out", capsys, "--config", config, "--prompts", str(table))["about"]
    assert " of 5 prompts," in about["removal"]
    retrieval, removal = (tmp_path / "out/encoders.md").read_text().split("## Disentanglement")
    assert "published" not in retrieval, "the pairs are not COCO's"
    assert "| T5-v1.1-XXL (published) | 0.893 |" in removal


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--encoders", "{{}}"], "encoders: name at least one"),
        (["--config", "{config}", "--fraction", "1.5"], "fraction must lie between 0 and 1"),
        (["--config", "{config}", "--seeds", "[-1]"], "seeds must lie in 0 .. "),
        (["--config", "{config}", "--device", "gpu"], "device: 'gpu' is not there"),
        (["--config", "{config}", "--k", "0"], "k must be at least 1"),
        (["--config", "{config}", "--k", "151"], "k must be at most "),
        (["--config", "{config}", "--prompts", "nowhere.csv"], "cannot read benchmark nowhere.csv"),
        (["--config", "{config}", "--prompts", "nowhere.txt"], "prompts: cannot read 'nowhere.txt'"),
    ],
)
def test_mistakes_end_in_one_sentence(config, tmp_path, capsys, options, said):
    words = [word.format(config=config) for word in options]
    with pytest.raises(SystemExit) as end:
        main(["encoders", *SMALL, "--out", str(tmp_path / "out"), *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_the_shipped_study_names_encoders_that_exist():
    content = yaml.safe_load((ROOT / "experiments/encoders/shapes.yaml").read_text())
    assert next(iter(content["encoders"])) == "words"
    assert {e["class_path"] for e in content["encoders"].values()} == {"WordEncoder", "DegradedEncoder"}
