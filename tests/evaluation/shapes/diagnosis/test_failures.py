"""Pictures that are drawn, each with a failure that is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from emf_lightning.data.geneval_prompts import color_attr, colors, counting, position, single_object, two_object
from emf_lightning.data.shapes.rendering import render
from emf_lightning.data.shapes.scenes import scene_for
from emf_lightning.data.shapes.world import FULL, SMALL
from emf_lightning.evaluation.shapes.detector import ShapesDetector
from emf_lightning.evaluation.shapes.diagnosis.failures import (
    BINDING,
    BLENDED,
    COLOUR,
    CORRECT,
    COUNT,
    FAINT_OBJECT,
    KINDS,
    MALFORMED,
    NOTHING,
    SHAPE,
    SUPERPOSITION,
    blobs,
    failure_kinds,
)
from tests.evaluation.shapes.perturbations import blurred, noisy, render_all, scenes, to_bytes

DETECTOR = ShapesDetector(SMALL)
GREY = np.full((36, 36, 3), 153, np.uint8)


def picture(*objects: tuple[str, str, int, int]) -> np.ndarray:
    """A picture of (colour, shape, column, row) in the small world's cells of 12 px."""
    return render([(colour, shape, (12 * x + 6, 12 * y + 6), 4.4) for colour, shape, x, y in objects], 36)


def mixed(a: np.ndarray, b: np.ndarray, weight: float = 0.5) -> np.ndarray:
    return np.rint(weight * a.astype(float) + (1 - weight) * b).astype(np.uint8)


def kind(image: np.ndarray, prompt) -> str:
    return failure_kinds(DETECTOR, image[None], [prompt])[0][0]


RED_AND_BLUE = color_attr(("red", "circle"), ("blue", "square"))
RIGHT = picture(("red", "circle", 0, 0), ("blue", "square", 1, 0))
MOVED = picture(("red", "circle", 1, 2), ("blue", "square", 2, 2))
BLEND = tuple(np.mean([(220, 30, 30), (40, 160, 60)], 0))


def recoloured(image: np.ndarray, old: tuple[int, ...], new: tuple[float, ...]) -> np.ndarray:
    result = image.copy()
    result[(image == old).all(-1)] = np.rint(new)
    return result


def bar(colour: tuple[int, int, int]) -> np.ndarray:
    result = GREY.copy()
    result[4:8, 2:18] = colour
    return result


CASES = {
    "as asked": (RIGHT, RED_AND_BLUE, CORRECT),
    "the mean of two layouts": (mixed(RIGHT, MOVED), RED_AND_BLUE, SUPERPOSITION),
    "the mean of two places of one object": (
        mixed(picture(("red", "circle", 0, 0)), picture(("red", "circle", 2, 1))),
        single_object("circle"),
        SUPERPOSITION,
    ),
    "one object shared, the other at two places": (
        mixed(RIGHT, picture(("red", "circle", 0, 0), ("blue", "square", 0, 1))),
        RED_AND_BLUE,
        SUPERPOSITION,
    ),
    "two colours at one place, shifted": (
        mixed(render([("red", "circle", (12, 12), 4.4)], 36), render([("blue", "circle", (17, 14), 4.4)], 36)),
        single_object("circle"),
        SUPERPOSITION,
    ),
    "an object of half the contrast": (
        mixed(picture(("red", "circle", 1, 1)), GREY),
        single_object("circle"),
        FAINT_OBJECT,
    ),
    "one of two objects faint": (mixed(RIGHT, picture(("red", "circle", 0, 0)), 0.3), RED_AND_BLUE, FAINT_OBJECT),
    "two colours at one place": (
        recoloured(picture(("red", "circle", 1, 1)), (220, 30, 30), BLEND),
        single_object("circle"),
        BLENDED,
    ),
    "an object of two colours, and one at its side": (
        recoloured(RIGHT, (220, 30, 30), tuple(np.mean([(220, 30, 30), (15, 15, 15)], 0))),
        RED_AND_BLUE,
        BLENDED,
    ),
    "one of two objects blended": (recoloured(RIGHT, (220, 30, 30), BLEND), RED_AND_BLUE, BLENDED),
    "an empty picture": (GREY, RED_AND_BLUE, NOTHING),
    "another background": (np.full_like(GREY, 30), RED_AND_BLUE, NOTHING),
    "noise": (np.random.default_rng(0).integers(0, 256, GREY.shape, dtype=np.uint8), RED_AND_BLUE, NOTHING),
    "a bar": (bar((220, 30, 30)), single_object("circle"), NOTHING),
    "one object missing": (picture(("red", "circle", 0, 0)), RED_AND_BLUE, COUNT),
    "three of four": (
        picture(*(("pink", "cross", x, 0) for x in range(3))),
        counting("cross", 4),
        COUNT,
    ),
    "three of two": (picture(*(("pink", "cross", x, 0) for x in range(3))), counting("cross", 2), COUNT),
    "one of two objects a bar": (
        np.where(bar((220, 30, 30)) != GREY, bar((220, 30, 30)), picture(("blue", "square", 2, 2))),
        RED_AND_BLUE,
        MALFORMED,
    ),
    "another shape": (picture(("red", "triangle", 0, 0), ("blue", "square", 1, 0)), RED_AND_BLUE, SHAPE),
    "another single shape": (picture(("red", "triangle", 0, 0)), single_object("circle"), SHAPE),
    "one counted object of another shape": (
        picture(("red", "circle", 0, 0), ("red", "square", 1, 0)),
        counting("circle", 2),
        SHAPE,
    ),
    "another colour": (picture(("green", "circle", 1, 1)), colors("red", "circle"), COLOUR),
    "one other colour of two": (picture(("red", "circle", 0, 0), ("green", "square", 1, 0)), RED_AND_BLUE, COLOUR),
    "both colours the same": (picture(("red", "circle", 0, 0), ("red", "square", 1, 0)), RED_AND_BLUE, COLOUR),
    "colours swapped": (picture(("blue", "circle", 0, 0), ("red", "square", 1, 0)), RED_AND_BLUE, BINDING),
    "places swapped": (
        picture(("red", "circle", 1, 0), ("blue", "square", 0, 0)),
        position("circle", "left of", "square"),
        BINDING,
    ),
    "below in place of left": (
        picture(("red", "circle", 0, 1), ("blue", "square", 0, 0)),
        position("circle", "left of", "square"),
        BINDING,
    ),
    "any colours where none are asked": (RIGHT, two_object("square", "circle"), CORRECT),
}


@pytest.mark.parametrize("name", CASES)
def test_a_drawn_failure_has_its_kind(name) -> None:
    image, prompt, expected = CASES[name]
    assert kind(image, prompt) == expected


def test_every_kind_is_among_the_cases() -> None:
    assert {expected for *_, expected in CASES.values()} == {CORRECT, *KINDS}


@pytest.mark.parametrize("world", [SMALL, FULL], ids=lambda world: world.name)
def test_clean_noisy_and_blurred_scenes_are_correct_and_have_no_faint_blob(world) -> None:
    drawn, detector = scenes(world, 15 if world is SMALL else 4), ShapesDetector(world)
    clean = render_all(world, drawn)
    for images in (clean, noisy(clean, 12), blurred(clean, 0.8)):
        for scene, faint, clear in zip(drawn, *blobs(detector, images), strict=True):
            assert not faint or faint + clear <= len(scene.objects)  # the thin ring of the full world, blurred
        kinds, _ = failure_kinds(detector, images, [scene.prompt for scene in drawn])
        assert kinds.count(CORRECT) >= len(kinds) - 1


def test_noise_of_any_strength_and_grain_is_no_superposition() -> None:
    rng = np.random.default_rng(0)
    strong = [153 + rng.normal(0, level, (20, 36, 36, 3)) for level in (30, 60, 90)]
    grains = [gaussian_filter(rng.normal(0, 1, (20, 36, 36, 3)), (0, grain, grain, 0)) for grain in (1, 2, 4)]
    noise = np.concatenate([*strong, *(153 + 60 * grain / grain.std() for grain in grains)])
    kinds, _ = failure_kinds(DETECTOR, to_bytes(noise), [RED_AND_BLUE] * len(noise))
    assert kinds.count(SUPERPOSITION) <= 2 and CORRECT not in kinds


@pytest.mark.parametrize("world", [SMALL, FULL], ids=lambda world: world.name)
@pytest.mark.parametrize("weight", [0.45, 0.5])
def test_means_of_two_random_layouts_of_a_prompt_are_superpositions(world, weight) -> None:
    """Layouts that cover each other are no superposition to see: the two share no cell in these."""
    rng, detector, images, prompts = np.random.default_rng(3), ShapesDetector(world), [], []
    for scene in scenes(world, 12, seed=5):
        cells = {tuple(int(c // world.cell) for c in o.centre) for o in scene.objects}
        for _ in range(50):
            other = scene_for(world, scene.prompt, rng)
            if cells.isdisjoint(tuple(int(c // world.cell) for c in o.centre) for o in other.objects):
                images.append(mixed(scene.render(world), other.render(world), weight))
                prompts.append(scene.prompt)
                break
    kinds, _ = failure_kinds(detector, np.stack(images), prompts)
    assert len(kinds) > 40
    assert kinds.count(SUPERPOSITION) >= 0.97 * len(kinds), kinds
