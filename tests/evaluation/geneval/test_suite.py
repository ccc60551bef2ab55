from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors.torch import load_file, save_file

from emf_lightning.data.geneval_prompts import PALETTE
from emf_lightning.data.shapes.rendering import render
from emf_lightning.evaluation.geneval.clip_colours import ClipColours, check_colours
from emf_lightning.evaluation.geneval.detector import CLASSES, ObjectDetector, check_detector
from emf_lightning.evaluation.geneval.mask2former import Mask2FormerDetector, preprocess
from emf_lightning.evaluation.geneval.suite import GenEvalSuite, geneval_prompts
from emf_lightning.evaluation.geneval.suite_score import SuiteScore
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.geneval.verdict import Detection
from tests.evaluation.tiny_clip import save_tiny_clip
from tests.evaluation.tiny_detector import save_tiny

GREY = np.full((96, 96, 3), 153, np.uint8)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Mask2FormerDetector:
    return Mask2FormerDetector(save_tiny(tmp_path_factory.mktemp("detector")), short_side=64)


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> ClipColours:
    return ClipColours("emf-tiny-clip", save_tiny_clip(tmp_path_factory.mktemp("clip")))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_detector_with_random_weights_is_refused(detector):
    with pytest.raises(ValueError, match=r"is broken: on a portrait photograph it sees no person.*give weights"):
        check_detector(detector)


def test_a_detector_that_sees_a_person_everywhere_is_refused(tmp_path):
    broken = Mask2FormerDetector(save_tiny(tmp_path), short_side=64)
    broken.network.class_predictor.bias.data[0] = 50
    with pytest.raises(ValueError, match=r"it sees .*(people|person)"):
        check_detector(broken)


class Portraitist(ObjectDetector):
    """Sees one person of a given score in whatever is not plain."""

    name = "portraitist"

    def __init__(self, score: float = 0.99, phantom: bool = False) -> None:
        self.score, self.phantom = score, phantom

    def __call__(self, image):
        if image.std() < 1 and not self.phantom:
            return []
        mask = np.zeros(image.shape[:2], bool)
        mask[len(mask) // 3 :] = True
        return [Detection("person", self.score, (0, len(mask) // 3, image.shape[1], len(mask)), mask)]


def test_a_detector_that_sees_the_person_and_nothing_else_passes():
    check_detector(Portraitist())
    with pytest.raises(ValueError, match=r"it sees a person of score 0\.60"):
        check_detector(Portraitist(0.6))
    with pytest.raises(ValueError, match=r"on plain grey 'person' of score 0\.99"):
        check_detector(Portraitist(phantom=True))


@pytest.mark.slow
def test_a_network_that_was_taught_the_photograph_passes(tmp_path):
    taught = Mask2FormerDetector(save_tiny(tmp_path), short_side=64)
    network = taught.network.requires_grad_(True)
    with Image.open(get_sample_data("grace_hopper.jpg")) as opened:
        photograph = np.array(opened.convert("RGB"))
    inputs = [preprocess(torch.from_numpy(p), 64)[0] for p in (photograph, np.full((512, 512, 3), 153, np.uint8))]
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        for pixels, label in zip(inputs, (0, 80), strict=True):
            output = network(pixel_values=pixels)
            wanted = torch.full((1, 20), 80)
            wanted[0, 0] = label
            loss = torch.nn.functional.cross_entropy(
                output.class_queries_logits.transpose(1, 2), wanted, reduction="none"
            )
            loss = loss.mean() + 20 * loss[0, 0]
            if label == 0:
                mask = torch.zeros_like(output.masks_queries_logits[0, 0])
                mask[5:] = 1
                logits = output.masks_queries_logits[0, 0]
                loss = loss + 5 * torch.nn.functional.binary_cross_entropy_with_logits(logits, mask)
            loss.backward()
        optimizer.step()
    network.requires_grad_(False)

    check_detector(taught)


def test_a_colour_reader_with_random_weights_is_refused(colours):
    with pytest.raises(ValueError, match=r"of ten flat discs it names \d colours right"):
        check_colours(colours)


def test_a_suite_refuses_before_it_evaluates_anything(detector, colours):
    with pytest.raises(ValueError, match=r"Mask2FormerDetector: .* is broken"):
        GenEvalSuite(detector, colours)


def test_clip_without_weights_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"ClipColours: cannot load model='no-such-model'.*path of its weights"):
        ClipColours("no-such-model", "nowhere.pt")


# -- colours ----------------------------------------------------------------------------------------------------------


def test_colours_are_those_of_the_nearest_mean_sentence_about_the_object_on_grey(colours):
    image = render([("red", "circle", (30.0, 30.0), 20.0), ("blue", "square", (75.0, 70.0), 15.0)], 96)
    masks = [(image == np.array(rgb)).all(-1) for rgb in ((220, 30, 30), (40, 80, 220))]
    detections = []
    for mask in masks:
        y, x = np.nonzero(mask)
        detections.append(Detection("cup", 0.9, (x.min(), y.min(), x.max() + 1, y.max() + 1), mask))

    expected = []
    for detection in detections:
        x0, y0, x1, y1 = (int(edge) for edge in detection.box)
        crop = np.where(detection.mask[..., None], image, GREY)[y0:y1, x0:x1]
        vector = colours.clip.model.encode_image(colours.clip.transform(Image.fromarray(crop))[None])[0]
        best = []
        for colour in PALETTE:
            texts = [
                f"a photo of a {colour} cup",
                f"a photo of a {colour}-colored cup",
                f"a photo of a {colour} object",
            ]
            vectors = colours.clip.model.encode_text(colours.clip.tokenizer(texts))
            mean = (vectors / vectors.norm(dim=1, keepdim=True)).mean(0)
            best.append(float(torch.nn.functional.cosine_similarity(vector, mean, dim=0)))
        expected.append(list(PALETTE)[int(np.argmax(best))])
    assert colours(image, detections, "cup") == expected
    assert colours(image, [], "cup") == []


# -- the whole decision -----------------------------------------------------------------------------------------------


class Known(ObjectDetector):
    """Sees what a prompt asks for, or with ``shift`` what another one does, in colours painted into the image."""

    name = "known"

    def __init__(self) -> None:
        self.answer: tuple = ()

    def __call__(self, image):
        seen, order = [], {"left of": (0, 1), "right of": (2, 1), "above": (1, 0), "below": (1, 2)}
        for item in self.answer:
            for _ in range(item["count"]):
                x, y = order[item["position"][0]] if "position" in item else (1, 1)
                mask = np.zeros((96, 96), bool)
                mask[32 * y + 6 : 32 * y + 26, 32 * x + 6 : 32 * x + 26] = True
                box = (32 * x + 6, 32 * y + 6, 32 * x + 26, 32 * y + 26)
                seen.append(Detection(item["class"], 0.99, box, mask, item.get("color")))
        return seen


class Told(ClipColours):
    """Reads the colour that the detection bears."""

    def __init__(self) -> None:
        pass

    def __call__(self, image, detections, label):
        return [detection.colour or "red" for detection in detections]


def scores(of) -> TaskScores:
    prompts, detector = geneval_prompts(), Known()
    suite = GenEvalSuite(detector, Told(), check=False)
    evaluated = []
    for number, prompt in enumerate(prompts):
        detector.answer = prompts[of(number)].include
        evaluated.append((prompt, suite.evaluate(GREY, prompt)))
    return TaskScores.of(evaluated)


def test_an_oracle_scores_everything_and_another_prompts_image_next_to_nothing():
    perfect = scores(lambda number: number)
    assert perfect.correct == dict.fromkeys(perfect.correct, 1.0)
    assert perfect.overall == 1
    assert perfect.images == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert scores(lambda number: (number + 7) % 553).overall < 0.05


def test_an_oracle_that_errs_with_probability_p_scores_one_minus_p():
    wrong = np.random.default_rng(0).random(553) < 0.3
    found = scores(lambda number: (number + 7) % 553 if wrong[number] else number)
    assert abs(found.overall - 0.7) < 3 * found.standard_error


def test_settings_tell_apart_what_changes_a_score(detector, colours, tmp_path):
    settings = SuiteScore(GenEvalSuite(detector, colours, check=False)).settings()
    folder = tmp_path / detector.name.split()[-1]
    save_tiny(folder)
    weights = load_file(folder / "model.safetensors")
    weights["class_predictor.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def different(**changed) -> set[str]:
        other = SuiteScore(GenEvalSuite(**{"detector": detector, "colours": colours, "check": False} | changed))
        return {name for name, value in other.settings().items() if settings[name] != value}

    assert different() == set()
    assert different(detector=Mask2FormerDetector(str(folder), short_side=64)) == {"detector_weights"}
    assert different(detector=Mask2FormerDetector(str(folder), short_side=96)) == {"detector_weights", "short_side"}
    clip = save_tiny_clip(tmp_path, seed=1)
    assert different(colours=ClipColours("emf-tiny-clip", clip)) == {"colours_weights"}
    assert different(colours=ClipColours("emf-tiny-clip", clip, quick_gelu=True)) == {
        "colours_weights",
        "colours_quick_gelu",
    }


def test_the_pipeline_runs_with_real_networks_and_reports_genevals_details(detector, colours):
    suite = GenEvalSuite(detector, colours, check=False)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    prompt = next(p for p in suite.prompts() if p.tag == "colors")
    thing = prompt.include[0]["class"]
    bias = detector.network.class_predictor.bias.data.clone()
    detector.network.class_predictor.bias.data[CLASSES.index(thing)] = 40
    try:
        verdict = suite.evaluate(image, prompt)
    finally:
        detector.network.class_predictor.bias.data.copy_(bias)
    assert list(verdict.boxes) == [thing]
    assert all(len(row) == 5 and row[4] > 0.3 for row in verdict.boxes[thing])
    assert verdict.correct or f"expected {prompt.include[0]['color']} {thing}>=1, found" in verdict.reason
    json.dumps(verdict.boxes)


PROMPTS = geneval_prompts()


def test_the_553_records_are_the_published_ones_byte_by_byte():
    records = [{k: v for k, v in prompt.metadata().items() if k != "held_out"} for prompt in PROMPTS]
    file = "".join(json.dumps(record) + "\n" for record in records)

    assert len(records) == 553
    # the digest of GenEval's evaluation_metadata.jsonl
    assert hashlib.sha256(file.encode()).hexdigest() == (
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    )


def test_prompts_known_from_publications_have_their_numbers():
    # a number out of 553 and its prompt, as papers and other evaluators show them
    known = {
        16: "a photo of a skateboard",
        88: "a photo of a horse and a computer keyboard",
        344: "a photo of a red backpack",
        368: "a photo of a baseball glove below an umbrella",
        393: "a photo of a hair drier left of a toilet",
        504: "a photo of a yellow pizza and a green oven",
        552: "a photo of a blue pizza and a yellow baseball glove",
    }
    assert {number: PROMPTS[number].prompt for number in known} == known


def test_tasks_have_the_published_sizes_and_every_text_is_one_record():
    assert Counter(prompt.tag for prompt in PROMPTS) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert len({prompt.prompt for prompt in PROMPTS}) == 553


def test_no_person_has_a_colour():
    coloured = [item["class"] for prompt in PROMPTS for item in prompt.include if "color" in item]
    assert len(coloured) == 94 + 200
    assert "person" not in coloured


def test_classes_are_cocos_things_under_genevals_names():
    assert len(set(CLASSES)) == 80
    assert [CLASSES[i] for i in (0, 63, 64, 65, 66, 79)] == [
        "person",
        "laptop",
        "computer mouse",
        "tv remote",
        "computer keyboard",
        "toothbrush",
    ]
