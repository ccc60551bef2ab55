from __future__ import annotations

import numpy as np
import pytest
import torch

from emf_lightning.data.shapes.rendering import render
from emf_lightning.data.shapes.world import SMALL
from emf_lightning.evaluation.shapes.detector import ShapesDetector
from emf_lightning.evaluation.shapes.diagnosis.layouts import boundary_distances, perturbed, same_layout

DETECTOR = ShapesDetector(SMALL)
SIZES = (0.05, 0.1, 0.2, 0.4)


def layout(*objects):
    return DETECTOR(render([(colour, shape, place, 4.4) for colour, shape, place in objects], 36))


RED, BLUE = ("red", "circle", (6, 6)), ("blue", "square", (18, 6))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ((RED, BLUE), True),
        ((BLUE, RED), True),
        ((("red", "circle", (9, 8)), BLUE), True),
        ((("red", "circle", (6, 18)), BLUE), False),
        ((("green", "circle", (6, 6)), BLUE), False),
        ((("red", "diamond", (6, 6)), BLUE), False),
        ((("blue", "square", (6, 6)), ("red", "circle", (18, 6))), False),
        ((RED,), False),
        ((RED, BLUE, ("red", "circle", (30, 30))), False),
        ((), False),
    ],
)
def test_layouts_are_the_same_where_objects_can_be_paired(other, same) -> None:
    assert same_layout(layout(RED, BLUE), layout(*other), 6) is same
    assert same_layout(layout(*other), layout(RED, BLUE), 6) is same


def test_two_objects_are_not_paired_with_one() -> None:
    a = layout(("red", "circle", (6, 6)), ("red", "circle", (18, 6)))
    b = layout(("red", "circle", (12, 6)), ("red", "circle", (30, 30)))
    assert not same_layout(a, b, 7)
    assert same_layout([], [], 6)


def test_perturbed_noise_is_unit_normal() -> None:
    torch.manual_seed(0)
    e, d = torch.randn(2, 50_000)
    for size in SIZES:
        moved = perturbed(e, d, size)
        assert float(moved.std()) == pytest.approx(1, abs=0.02)
        assert float((moved * e).mean()) == pytest.approx((1 - size**2) ** 0.5, abs=0.02)
    assert torch.equal(perturbed(e, d, 1.0), d)


def test_the_distance_is_the_first_size_that_crosses_a_known_boundary() -> None:
    """The sign of the first number decides the side on which the circle stands."""
    left, right = layout(("red", "circle", (6, 6))), layout(("red", "circle", (30, 6)))
    torch.manual_seed(1)
    noise, directions = torch.randn(200, 1, 2, 2), torch.randn(3, 200, 1, 2, 2)

    def layouts_of(rows, moved):
        assert len(rows) == len(moved) > 0
        return [right if float(one.flatten()[0]) > 0 else left for one in moved]

    before = layouts_of(range(200), noise)
    found = boundary_distances(before, noise, list(directions), SIZES, layouts_of, 6)
    e, d = noise.flatten(1)[:, 0].double(), directions.flatten(2)[:, :, 0].double()
    # e crosses 0 where size / sqrt(1 - size^2) > |e / d| and d points to the other side
    tangent = torch.where(e.sign() != d.sign(), (e / d).abs(), torch.inf).min(0).values
    size = tangent / (1 + tangent**2).sqrt()
    size[tangent.isinf()] = torch.inf
    expected = np.searchsorted(SIZES, size.numpy())
    assert len(set(expected.tolist())) == len(SIZES) + 1
    assert found.tolist() == expected.tolist()
