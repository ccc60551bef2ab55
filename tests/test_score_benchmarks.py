"""`emf score` with the benchmarks' own kinds of networks, tiny ones, against scores worked out here."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipForQuestionAnswering, BlipProcessor, Mask2FormerForUniversalSegmentation

from emf_lightning.cli import main
from emf_lightning.evaluation.dpg.dpg_bench import COLUMNS
from emf_lightning.evaluation.geneval.clip_colours import ClipColours
from emf_lightning.evaluation.geneval.detector import CLASSES
from emf_lightning.evaluation.geneval.mask2former import Mask2FormerDetector
from emf_lightning.evaluation.geneval.suite import geneval_prompts
from tests.evaluation.tiny_blip import save_tiny_blip
from tests.evaluation.tiny_clip import save_tiny_clip
from tests.evaluation.tiny_detector import save_tiny

SEEN = ("bus", "dog")
"""All that the detector is made to see."""


def write_images(folder: Path, prompts: list[str], names: list[str]) -> list[np.ndarray]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    # half noise, half a plain colour
    plain = rng.integers(0, 256, (len(prompts), 1, 1, 3))
    images = [(rng.integers(0, 256, (64, 64, 3)) // 2 + p // 2).astype(np.uint8) for p in plain]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / name)
    rows = [{"file": name, "prompt": prompt} for name, prompt in zip(names, prompts, strict=True)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return images


def scored(folder: Path, metric: dict, *options: str) -> tuple[dict, list[dict]]:
    (folder.parent / "metric.yaml").write_text(json.dumps({"metric": metric}))
    out = folder.parent / "out"
    main(["score", str(folder), "--config", str(folder.parent / "metric.yaml"), "--out", str(out), *options])
    lines = (out / "results.jsonl").read_text().splitlines()
    return json.loads((out / "scores.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture
def detector(tmp_path) -> str:
    folder = tmp_path / "detector"
    save_tiny(folder)
    network = Mask2FormerForUniversalSegmentation.from_pretrained(folder)
    with torch.no_grad():
        network.class_predictor.weight.mul_(3)
        for name in SEEN:
            network.class_predictor.bias[CLASSES.index(name)] = 12
    network.save_pretrained(folder)
    return str(folder)


def test_geneval_is_the_mean_of_what_its_rule_says_about_detector_and_colours(detector, tmp_path):
    prompts = [p for p in geneval_prompts() if p.tag == "single_object"][:2]
    for tag in ("single_object", "two_object", "counting", "colors", "color_attr"):
        prompts += [p for p in geneval_prompts() if p.tag == tag and any(i["class"] in SEEN for i in p.include)][:3]
    images = write_images(
        tmp_path / "images", [p.prompt for p in prompts], [f"{n:02d}.png" for n in range(len(prompts))]
    )
    weights = save_tiny_clip(tmp_path)
    see, read = Mask2FormerDetector(detector, short_side=64), ClipColours("emf-tiny-clip", weights)
    shares: dict[str, list[bool]] = {}
    for image, prompt in zip(images, prompts, strict=True):
        good = True
        for item in prompt.include:
            found = [d for d in see(image) if d.label == item["class"]]
            found = [d for d in found if d.score > (0.9 if prompt.tag == "counting" else 0.3)][:16]
            if prompt.tag == "counting":
                good &= len(found) == item["count"]
            elif "color" in item:
                good &= item["color"] in read(image, found[: item["count"]], item["class"])
            else:
                good &= len(found) >= item["count"]
        shares.setdefault(prompt.tag, []).append(good)
    expected = {tag: float(np.mean(values)) for tag, values in shares.items()}
    init = {
        "detector": {"class_path": "Mask2FormerDetector", "init_args": {"model": detector, "short_side": 64}},
        "colours": {"model": "emf-tiny-clip", "pretrained": weights},
        "check": False,  # random weights are what it is there to refuse
    }
    suite = {"class_path": "GenEvalSuite", "init_args": init}
    scores, rows = scored(
        tmp_path / "images", {"class_path": "SuiteScore", "init_args": {"suite": suite}}, "--partial", "true"
    )

    assert [row["correct"] for row in rows if row["tag"] == "single_object"] == shares["single_object"]
    assert {name: scores["scores"][name] for name in expected} == pytest.approx(expected)
    assert scores["scores"]["score"] == pytest.approx(np.mean(list(expected.values())))
    assert 0 < scores["scores"]["score"] < 1
    settings = scores["settings"]
    assert (settings["detector"], settings["short_side"]) == ("Mask2Former detector", 64)
    assert settings["colours_model"] == "emf-tiny-clip"
    assert settings["detector_weights"] != settings["colours_weights"]


TABLE = [
    ("one", "a dog", 1, "0", "entity - whole (dog)", "is there a dog ?"),
    ("one", "a dog", 2, "1", "attribute - color (dog)", "is a cat there ?"),
    ("one", "a dog", 3, "2", "attribute - color (dog)", "is the dog yes ?"),
    ("two", "a cat", 1, "0", "entity - whole (cat)", "is there a cat ?"),
    ("two", "a cat", 2, "0", "entity - whole (dog)", "dog ?"),
    ("two", "a cat", 3, "2", "global", "a dog is there"),
]


@pytest.fixture
def vqa_model(tmp_path) -> str:
    """A network that was taught to say yes to dogs and no to cats."""
    (tmp_path / "judge").mkdir()
    folder = save_tiny_blip(tmp_path / "judge", 1.0)
    network, processor = BlipForQuestionAnswering.from_pretrained(folder), BlipProcessor.from_pretrained(folder)
    texts = processor(text=[row[-1] for row in TABLE], padding=True, return_tensors="pt")
    words = ["yes" if "dog" in row[-1] else "no" for row in TABLE]
    answers = processor(text=words, return_tensors="pt")["input_ids"]
    answers[:, 0] = network.decoder_start_token_id
    pixels = torch.randn(len(TABLE), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        network(**texts, pixel_values=pixels, labels=answers).loss.sum().backward()
        optimizer.step()
    network.save_pretrained(folder)
    return folder


def test_dpg_bench_is_the_mean_of_gated_answers_of_its_vqa_model(vqa_model, tmp_path):
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *TABLE])
    prompts, names = ["a dog", "a dog", "a cat", "a cat"], ["a.png", "b.png", "c.png", "d.png"]
    images = write_images(tmp_path / "images", prompts, names)
    network, processor = (
        BlipForQuestionAnswering.from_pretrained(vqa_model).eval(),
        BlipProcessor.from_pretrained(vqa_model),
    )
    shares: dict[str, list[float]] = {"a dog": [], "a cat": []}
    for image, prompt in zip(images, prompts, strict=True):
        said: dict[int, bool] = {0: True}
        for _, text, number, parent, _, question in TABLE:
            if text == prompt:
                ids = network.generate(**processor(image, question, return_tensors="pt"), max_new_tokens=8)
                yes = processor.decode(ids[0], skip_special_tokens=True).strip().lower().rstrip(".") == "yes"
                said[number] = yes and said[int(parent)]
        shares[prompt].append(sum(list(said.values())[1:]) / 3)
    init = {
        "benchmark": str(tmp_path / "table.csv"),
        "vqa_model": {"class_path": "BlipVqa", "init_args": {"model": vqa_model}},
    }
    scores, rows = scored(tmp_path / "images", {"class_path": "DpgBench", "init_args": init})

    assert [row["dpg_blip"] for row in rows] == pytest.approx([*shares["a dog"], *shares["a cat"]])
    expected = 100 * np.mean([np.mean(values) for values in shares.values()])
    assert scores["scores"]["score"] == pytest.approx(expected)
    assert 0 < expected < 100
    assert scores["settings"]["judge_model"] == "judge"

    # the whole folder again: the published script leaves out the table's first prompt
    scores, rows = scored(tmp_path / "images", {"class_path": "DpgBench", "init_args": init | {"official": True}})
    assert scores["metric"] == "dpg_blip_official"
    assert [row["dpg_blip_official"] for row in rows] == [None, None, *map(pytest.approx, shares["a cat"])]
    assert scores["scores"]["score"] == pytest.approx(100 * np.mean(shares["a cat"]))
