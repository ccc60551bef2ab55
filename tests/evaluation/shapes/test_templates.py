from __future__ import annotations

import numpy as np
import pytest

from emf_lightning.data.shapes.rendering import object_alpha
from emf_lightning.data.shapes.world import SMALL
from emf_lightning.evaluation.shapes.templates import binomial, gaussian, templates_of

TEMPLATES = templates_of(SMALL)
REACH = TEMPLATES.window // 2
RADIUS = sum(SMALL.radius) / 2 * SMALL.cell


def seen(shape: str, radius: float, contrast: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An object's smoothed alpha in its window, its centroid about the middle, its effective area."""
    alpha = contrast * binomial(object_alpha(shape, (REACH + 0.62, REACH + 0.41), radius, TEMPLATES.window))
    y, x = np.indices(alpha.shape)
    centroid = np.array([(alpha * x).sum(), (alpha * y).sum()]) / alpha.sum()
    shift = REACH - np.rint(centroid).astype(int)
    alpha, centroid = np.roll(alpha, shift, (1, 0)), centroid + shift
    return alpha[None], (centroid - REACH)[None], np.array([alpha.sum() ** 2 / (alpha**2).sum()])


@pytest.mark.parametrize("shape", SMALL.shapes)
@pytest.mark.parametrize("contrast", [1.0, 0.7])
def test_every_shape_matches_its_own_template(shape, contrast):
    alpha, offset, area = seen(shape, RADIUS, contrast)
    match = TEMPLATES.match(alpha, np.ones(alpha.shape, bool), offset, area)
    assert SMALL.shapes[match.shape[0]] == shape
    assert match.correlation[0] > 0.99
    assert match.margin[0] > 0.005
    assert match.contrast[0] == pytest.approx(contrast, rel=0.06)
    assert TEMPLATES.radii[match.radius[0]] == pytest.approx(RADIUS, rel=0.04)
    assert match.deviation[0] < 0.2


def test_a_dent_shows_as_a_deviation_unless_the_place_is_unknown():
    alpha, offset, area = seen("square", RADIUS)
    dent = alpha.copy()
    dent[0, REACH - 4 : REACH - 1, REACH - 4 : REACH - 1] = 0
    known = np.ones(alpha.shape, bool)
    assert TEMPLATES.match(dent, known, offset, area).deviation[0] > 0.5
    known[0, REACH - 5 : REACH, REACH - 5 : REACH] = False
    assert TEMPLATES.match(dent, known, offset, area).deviation[0] < 0.35


def test_no_things_match_nothing():
    window = TEMPLATES.window
    match = TEMPLATES.match(
        np.zeros((0, window, window), np.float32), np.zeros((0, window, window), bool), np.zeros((0, 2)), np.zeros(0)
    )
    assert match.shape.shape == match.deviation.shape == (0,)


def test_the_binomial_filter_shrinks_noise_as_it_says():
    noise = np.random.default_rng(0).normal(size=(200, 200)).astype(np.float32)
    assert binomial(noise).std() == pytest.approx(0.375, rel=0.02)
    assert binomial(np.full((5, 7), 3.0, np.float32)) == pytest.approx(3.0)


def test_the_gaussian_filter_keeps_mass_and_adds_its_variance():
    image = np.zeros((31, 31), np.float32)
    image[15, 15] = 1
    result = gaussian(image, 1.5)
    offsets = np.arange(31) - 15
    assert result.sum() == pytest.approx(1, rel=1e-4)
    assert (result.sum(0) * offsets**2).sum() == pytest.approx(1.5**2, rel=1e-2)
