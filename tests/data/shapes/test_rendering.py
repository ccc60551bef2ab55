from __future__ import annotations

import numpy as np
import pytest

from emf_lightning.data.geneval_prompts import BACKGROUND, PALETTE
from emf_lightning.data.shapes.rendering import coverage, object_alpha, render
from emf_lightning.data.shapes.world import SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_within_their_reach(shape):
    axis = np.linspace(-2, 2, 401)
    x, y = np.meshgrid(axis, axis)
    mask = coverage(shape, x, y)
    assert mask.any()
    assert max(abs(x[mask]).max(), abs(y[mask]).max()) <= 1.21


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi),
        ("square", 1.78**2),
        ("diamond", 2 * 1.2**2),
        ("cross", 2 * 0.72 * 2.2 - 0.72**2),
        ("ring", np.pi * (1.15 - 0.35)),
    ],
)
def test_alpha_adds_up_to_the_area(shape, area):
    alpha = object_alpha(shape, (20.3, 19.8), 12, 40)
    assert alpha.sum() == pytest.approx(area * 12**2, rel=0.015)  # 4 x 4 samples a pixel
    assert (alpha.min(), alpha.max()) == (0, 1)


def test_a_triangle_points_up():
    alpha = object_alpha("triangle", (18, 18), 10, 36)
    widths = alpha.sum(1)
    assert widths[10] < widths[18] < widths[25]


def test_the_ground_is_grey_and_the_middle_of_an_object_its_colour():
    for colour, rgb in PALETTE.items():
        image = render([(colour, "square", (18.0, 12.0), 5.0)], 36)
        assert image.dtype == np.uint8
        assert tuple(image[12, 18]) == rgb
        assert tuple(image[30, 30]) == BACKGROUND


def test_objects_are_rendered_whole_at_the_border():
    image = render([("red", "circle", (5.0, 31.0), 4.9)], 36)
    red = object_alpha("circle", (5.0, 31.0), 4.9, 36)[..., None]
    expected = np.array(BACKGROUND) + red * (np.array(PALETTE["red"]) - np.array(BACKGROUND))
    assert np.abs(image - expected).max() <= 0.51


def test_an_unknown_shape_is_an_error():
    with pytest.raises(ValueError, match="unknown shape 'cube'"):
        coverage("cube", np.zeros(1), np.zeros(1))
