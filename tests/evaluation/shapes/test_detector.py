from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from emf_lightning.data.geneval_prompts import BACKGROUND, PALETTE, TASKS, position, single_object
from emf_lightning.data.shapes.prompts import mark_held_out
from emf_lightning.data.shapes.rendering import object_alpha, render
from emf_lightning.data.shapes.scenes import Scene
from emf_lightning.data.shapes.world import FULL, SMALL
from emf_lightning.evaluation.geneval.verdict import evaluate
from emf_lightning.evaluation.shapes.detector import UNKNOWN, ShapesDetector
from tests.evaluation.shapes.perturbations import accepted, blurred, noisy, render_all, scenes, tinted, to_bytes

PER_TASK = 40
SCENES = scenes(SMALL, PER_TASK)
IMAGES = render_all(SMALL, SCENES)
DETECTOR = ShapesDetector(SMALL)
GREY = np.array(BACKGROUND, float)
LEAST, MOST = (fraction * SMALL.cell for fraction in SMALL.radius)
RADIUS = (LEAST + MOST) / 2


def found(image) -> list[tuple[str | None, str]]:
    return sorted((str(d.colour), d.label) for d in DETECTOR(image))


def test_clean_scenes_are_seen_exactly():
    for scene, seen in zip(SCENES, DETECTOR.detect_batch(IMAGES), strict=True):
        assert sorted((d.colour, d.label) for d in seen) == sorted((o.colour, o.shape) for o in scene.objects)
        assert min(d.score for d in seen) > 0.9
        assert evaluate(seen, scene.prompt).strict


@pytest.mark.parametrize(
    ("name", "worst"),
    [("noise 8", 0.98), ("noise 16", 0.97), ("blur 0.5", 0.98), ("blur 1", 0.95), ("tint", 0.98), ("contrast", 0.98)],
)
def test_blemishes_are_forgiven(name, worst):
    blemished = {
        "noise 8": lambda: noisy(IMAGES, 8),
        "noise 16": lambda: noisy(IMAGES, 16),
        "blur 0.5": lambda: blurred(IMAGES, 0.5),
        "blur 1": lambda: blurred(IMAGES, 1.0),
        "tint": lambda: tinted(IMAGES, 15),
        "contrast": lambda: to_bytes(128 + 0.75 * (IMAGES - 128.0)),
    }[name]()
    assert min(accepted(DETECTOR, blemished, SCENES, strict=True)) >= worst


def test_the_full_world_is_read_as_well():
    full_scenes = scenes(FULL, 5)
    images = render_all(FULL, full_scenes)
    detector = ShapesDetector(FULL)
    assert accepted(detector, images, full_scenes, strict=True) == [1.0] * len(TASKS)
    assert accepted(detector, blurred(noisy(images, 16), 1.0), full_scenes, strict=True) == [1.0] * len(TASKS)


def corrupted(scene: Scene) -> Scene:
    """The scene with the least change that makes its prompt untrue."""
    first, *rest = scene.objects
    match scene.prompt.tag:
        case "single_object" | "two_object":
            other = next(s for s in SMALL.shapes if s not in {o.shape for o in scene.objects})
            return Scene(scene.prompt, (replace(first, shape=other), *rest))
        case "counting":
            return Scene(scene.prompt, tuple(rest))
        case "colors":
            return Scene(scene.prompt, (replace(first, colour="red" if first.colour != "red" else "pink"),))
        case "position":
            return Scene(scene.prompt, (replace(first, centre=rest[0].centre), replace(rest[0], centre=first.centre)))
    return Scene(scene.prompt, (replace(first, colour=rest[0].colour), replace(rest[0], colour=first.colour)))


@pytest.mark.parametrize("sigma", [0, 16])
def test_the_least_corruption_is_noticed(sigma):
    images = render_all(SMALL, [corrupted(scene) for scene in SCENES])
    assert accepted(DETECTOR, noisy(images, sigma), SCENES) == [0.0] * len(TASKS)


def blobs(rng: np.random.Generator, n: int, sigma: float, channels: int) -> np.ndarray:
    """Smooth random fields of unit variance."""
    field = blurred(to_bytes(128 + 100 * rng.normal(size=(n, 48, 48, channels))), sigma)[:, 6:42, 6:42].astype(float)
    return (field - field.mean()) / field.std()


def test_garbage_shows_next_to_nothing():
    rng = np.random.default_rng(3)
    n = 200
    colour = np.array([PALETTE[SMALL.colours[i]] for i in rng.integers(8, size=n)], float)[:, None, None]
    flat = np.clip(3 * (blobs(rng, n, 2.0, 1) - 1) + 0.5, 0, 1)
    sets = {
        "noise": rng.integers(0, 256, (n, 36, 36, 3), dtype=np.uint8),
        "smooth": to_bytes(GREY + 70 * blobs(rng, n, 2.0, 3)),
        "flat": to_bytes(GREY + flat * (colour - GREY)),
    }
    for name, images in sets.items():
        seen = DETECTOR.detect_batch(images)
        shapes = sum(d.label != UNKNOWN for detections in seen for d in detections)
        assert shapes <= {"noise": 0, "smooth": 1, "flat": 10}[name], name
        for shape in SMALL.shapes:
            correct = [evaluate(detections, single_object(shape)).correct for detections in seen]
            assert np.mean(correct) <= 0.02, (name, shape)


def test_another_ground_shows_nothing():
    assert DETECTOR.detect_batch(to_bytes(IMAGES + np.array([40.0, -40.0, 40.0]))) == [[]] * len(IMAGES)


SQUARE = object_alpha("square", (18, 18), RADIUS, 36)[..., None]
COLUMNS, ROWS = np.arange(36)[None, :, None], np.arange(36)[:, None, None]
RED, BLUE, YELLOW = (np.array(PALETTE[name], float) for name in ("red", "blue", "yellow"))


@pytest.mark.parametrize(
    "paint",
    [
        pytest.param(np.where(COLUMNS < 18, RED, BLUE), id="half red, half blue"),
        pytest.param(
            RED + (BLUE - RED) * np.clip((COLUMNS - 18 + RADIUS) / (2 * RADIUS), 0, 1), id="red fading into blue"
        ),
        pytest.param(np.broadcast_to((RED + BLUE) / 2, (36, 36, 3)), id="half red and half blue everywhere"),
        pytest.param(np.where((COLUMNS < 18) | (ROWS < 18), RED, GREY), id="a quarter missing"),
        pytest.param(np.where(COLUMNS < 18, RED, GREY), id="a half missing"),
        pytest.param(np.where(np.hypot(COLUMNS - 17.5, ROWS - 17.5) > 0.45 * RADIUS, RED, GREY), id="a hole in it"),
        pytest.param(np.broadcast_to(GREY + 0.5 * (RED - GREY), (36, 36, 3)), id="half its contrast"),
    ],
)
def test_what_is_no_object_is_refused(paint):
    (thing, *_) = seen = DETECTOR(to_bytes(GREY + SQUARE * (paint - GREY)))
    assert {d.label for d in seen} == {UNKNOWN}
    assert thing.score > 0.3
    assert not evaluate(seen, single_object("square")).correct


def test_faint_haze_is_let_be():
    haze = object_alpha("circle", (30, 30), RADIUS, 36)[..., None] * 0.2 * (YELLOW - GREY)
    assert found(to_bytes(GREY + SQUARE * (RED - GREY) + haze)) == [("red", "square")]


@pytest.mark.parametrize("colours", [("red", "red"), ("red", "blue"), ("black", "white"), ("pink", "purple")])
@pytest.mark.parametrize(("shape", "reach"), [("cross", 1.1), ("diamond", 1.2), ("triangle", 1.15), ("square", 0.89)])
def test_neighbours_a_pixel_apart_are_two(colours, shape, reach):
    for shift in (0.0, 0.3, 0.6):
        x = 1.5 + reach * RADIUS + shift
        right = x + 2 * reach * RADIUS + (0.2 if shape == "diamond" else 1.0)
        image = render([(colours[0], shape, (x, 17.6), RADIUS), (colours[1], shape, (right, 17.6), RADIUS)], 36)
        assert found(image) == sorted((colour, shape) for colour in colours), shift


def test_objects_are_found_off_the_cells():
    rng = np.random.default_rng(5)
    for _ in range(100):
        shape, colour = SMALL.shapes[rng.integers(5)], SMALL.colours[rng.integers(8)]
        radius = float(rng.uniform(LEAST, MOST))
        x, y = rng.uniform(1.21 * radius, 36 - 1.21 * radius, size=2)
        image = render([(colour, shape, (float(x), float(y)), radius)], 36)
        assert found(image) == [(colour, shape)]


def test_boxes_and_masks_lie_on_the_objects():
    for scene, seen in zip(SCENES[:PER_TASK], DETECTOR.detect_batch(IMAGES[:PER_TASK]), strict=True):
        (o,) = scene.objects
        alpha = object_alpha(o.shape, o.centre, o.radius, 36)
        assert seen[0].mask[alpha > 0.7].all()
        assert not seen[0].mask[alpha < 0.2].any()
        rows, columns = np.flatnonzero(alpha.max(1) > 0.5), np.flatnonzero(alpha.max(0) > 0.5)
        truth = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert np.abs(np.subtract(seen[0].box, truth)).max() <= 1


def test_a_flipped_image_shows_the_flipped_relation():
    flipped = {"left of": "right of", "right of": "left of", "above": "above", "below": "below"}
    for scene, image in zip(SCENES, IMAGES, strict=True):
        if scene.prompt.tag == "position":
            reference, subject = scene.prompt.include
            relation = subject["position"][0]
            other = mark_held_out(SMALL, position(subject["class"], flipped[relation], reference["class"]))
            seen = DETECTOR(image[:, ::-1].copy())
            assert evaluate(seen, other).correct
            assert evaluate(seen, scene.prompt).correct == (other == scene.prompt)


def test_exchanged_channels_change_the_colours_only():
    chromatic = ("red", "green", "blue", "purple", "yellow")
    colour_scenes = [s for s in SCENES if s.prompt.tag == "colors" and s.objects[0].colour in chromatic]
    images = render_all(SMALL, colour_scenes)[..., [1, 2, 0]]
    for scene, seen in zip(colour_scenes, DETECTOR.detect_batch(images), strict=True):
        assert not evaluate(seen, scene.prompt).correct


def test_a_batch_is_read_like_its_images():
    batch = np.concatenate([noisy(IMAGES[::9], 16), np.full((1, 36, 36, 3), 153, np.uint8)])
    for image, seen in zip(batch, DETECTOR.detect_batch(batch), strict=True):
        alone = DETECTOR(image)
        assert [(d.label, d.colour, d.box) for d in alone] == [(d.label, d.colour, d.box) for d in seen]
        assert [d.score for d in alone] == pytest.approx([d.score for d in seen], abs=1e-4)
        assert [d.score for d in seen] == sorted((d.score for d in seen), reverse=True)


@pytest.mark.parametrize("shape", [(1, 35, 36, 3), (1, 36, 36), (36, 36, 3)])
def test_images_of_another_size_are_an_error(shape):
    with pytest.raises(ValueError, match=r"uint8 \[N, 36, 36, 3\]"):
        DETECTOR.detect_batch(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="float32"):
        DETECTOR.detect_batch(np.zeros((1, 36, 36, 3), np.float32))
