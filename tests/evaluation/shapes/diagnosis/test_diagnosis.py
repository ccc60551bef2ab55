"""The page of drawn pictures, whose numbers are known."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from emf_lightning.cli.diagnose import images_of
from emf_lightning.evaluation.shapes.detector import ShapesDetector
from emf_lightning.evaluation.shapes.diagnosis.diagnosis import Boundary, Diagnosis, Samples
from emf_lightning.evaluation.shapes.diagnosis.failures import CORRECT, NOTHING, SUPERPOSITION
from emf_lightning.evaluation.shapes.suite import ShapesSuite

SUITE = ShapesSuite()
DETECTOR = ShapesDetector(SUITE.world)
ASKED = images_of(SUITE, 60)
PROMPTS = [one.prompt for one in ASKED]
REAL = np.stack([SUITE.reference_image(one.prompt, one.index) for one in ASKED])
OTHERS = np.stack([SUITE.reference_image(one.prompt, one.index + 2) for one in ASKED])
GREY = np.full_like(REAL[0], 153)


def samples(name: str, steps: int, images: np.ndarray) -> Samples:
    return Samples.of(name, steps, images, PROMPTS, DETECTOR)


def diagnosis(*models: Samples, boundary: Boundary | None = None) -> Diagnosis:
    real = samples("real pictures", 0, REAL)
    return Diagnosis(PROMPTS, samples("parent", 30, REAL), models, real, 0.05, 6.0, boundary, {"run": "drawn"})


def test_images_are_spread_over_tasks_prompts_and_numbers() -> None:
    assert [PROMPTS[i].tag for i in range(0, 60, 10)] == list(dict.fromkeys(p.tag for p in SUITE.prompts()))
    assert [one.index for one in ASKED[:10]] == [0, 1] * 5
    many = images_of(SUITE, 6 * 30)  # there are five prompts of single objects
    singles = [(one.prompt.prompt, one.index) for one in many if one.prompt.tag == "single_object"]
    assert len(set(singles)) == 30 and max(index for _, index in singles) == 5
    assert all(SUITE.prompts()[one.number] == one.prompt for one in many)


def test_a_model_that_is_right_in_half_of_its_images() -> None:
    images = np.where((np.arange(60) % 4 < 2)[:, None, None, None], REAL, GREY)  # every second prompt
    found = diagnosis(samples("m", 1, images)).numbers()
    shares = found["shares"]["m, 1 step"]["all"]
    assert (shares[CORRECT].value, shares[NOTHING].value) == (0.5, 0.5)
    assert shares[CORRECT].error == pytest.approx((0.25 / 30) ** 0.5, rel=0.1)  # thirty prompts, not sixty images
    agreement = found["agreement"]["m, 1 step"]
    assert (agreement["near"].value, agreement["same layout"].value) == (0.5, 0.5)
    assert found["variance"]["m, 1 step"]["within a prompt"].value == pytest.approx(0.5, abs=0.1)
    assert found["variance"]["real pictures"]["over all images"].value == 1
    assert found["boundary"] is None


def test_superpositions_are_counted_where_they_are() -> None:
    """Means of two layouts for the attribution task alone."""
    rows = np.array([prompt.tag == "color_attr" for prompt in PROMPTS])
    mean = np.rint((REAL.astype(float) + OTHERS) / 2).astype(np.uint8)
    found = diagnosis(samples("m", 1, np.where(rows[:, None, None, None], mean, REAL))).numbers()
    shares = found["shares"]["m, 1 step"]
    assert shares["position"][CORRECT].value == 1
    assert shares["attribution"][SUPERPOSITION].value >= 0.6
    assert shares["all"][CORRECT].value == pytest.approx(5 / 6, abs=0.05)
    groups = [name for name in shares if name.startswith("attribution")]
    assert sum(shares[name][CORRECT].images for name in groups[1:]) == 10


def test_errors_are_binned_by_the_distance_of_the_noise() -> None:
    images = REAL.copy()
    images[:10] = GREY
    boundary = Boundary(range(20), np.repeat([0, 4], 10), (0.05, 0.1, 0.2, 0.4), 3)
    bins = diagnosis(samples("m", 1, images), boundary=boundary).numbers()["boundary"]["bins"]
    assert list(bins) == ["up to 0.05", "0.05 to 0.1", "0.1 to 0.2", "0.2 to 0.4", "above 0.4"]
    near, *between, far = [of["models"]["m, 1 step"] for of in bins.values()]
    assert (near["fails"].value, near["another layout"].value, near["fails"].images) == (1, 1, 10)
    assert (far["fails"].value, far["distance"].value, far["fails"].images) == (0, 0, 10)
    assert [of["fails"].images for of in between] == [0, 0, 0]


def test_the_files_hold_the_numbers_and_the_worst_images(tmp_path) -> None:
    images = REAL.copy()
    images[[3, 30]] = GREY
    models = samples("a/m", 1, images), samples("a/m", 2, REAL), samples("b/m", 1, OTHERS)
    boundary = Boundary([0, 1], np.array([2, 4]), (0.05, 0.1, 0.2, 0.4), 1)
    page = diagnosis(*models, boundary=boundary).write(tmp_path / "new")
    assert (tmp_path / "new/diagnosis.md").read_text() == page
    found = json.loads((tmp_path / "new/diagnosis.json").read_text())
    assert found["shares"]["a/m, 1 step"]["all"]["correct"]["value"] == pytest.approx(58 / 60)
    assert found["boundary"]["bins"]["up to 0.05"]["parent fails"] == {"value": None, "error": None, "images": 0}
    for title in (*found["shares"], *found["agreement"]):
        assert f"| {title} |" in page
    lengths = {len(re.findall(r"(?<!\\)\|", line)) for line in page.splitlines() if line.startswith("| a/m, 1 step")}
    assert len(lengths) >= 3 and "nan" not in page
    with Image.open(tmp_path / "new/diagnosis.png") as picture:
        assert picture.width > picture.height * 0.5
    texts = [text.get_text() for text in diagnosis(*models).figure().texts]
    headings = {text.replace("\n", " ") for text in texts}
    assert {"1 step", "2 steps", "m, 1 step", "parent, 30 steps"} <= headings
    shown = [text for text in texts if text.startswith(NOTHING)]
    assert len(shown) == 2 and sum(text.startswith(CORRECT) for text in texts) == 22
