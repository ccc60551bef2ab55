from __future__ import annotations

import numpy as np

from emf_lightning.evaluation.shapes.components import compact_parts, connected_components


def flood_fill(classes: np.ndarray) -> np.ndarray:
    """Components by the book."""
    labels = np.zeros(classes.shape, int)
    number = 0
    for start in np.ndindex(classes.shape):
        if classes[start] < 0 or labels[start]:
            continue
        number += 1
        stack = [start]
        while stack:
            n, y, x = stack.pop()
            if labels[n, y, x]:
                continue
            labels[n, y, x] = number
            for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                v, u = y + dy, x + dx
                inside = 0 <= v < classes.shape[1] and 0 <= u < classes.shape[2]
                if inside and classes[n, v, u] == classes[n, y, x]:
                    stack.append((n, v, u))
    return labels


def test_components_are_those_of_a_flood_fill():
    classes = np.random.default_rng(0).integers(-1, 2, (5, 17, 23))
    labels, expected = connected_components(classes), flood_fill(classes)
    assert labels.max() == expected.max()
    pairs = np.unique(np.stack([labels.ravel(), expected.ravel()]), axis=1)
    assert pairs.shape[1] == labels.max() + 1  # one to one, the background on the background
    assert (labels == 0).tolist() == (classes < 0).tolist()


def test_a_spiral_is_one_component():
    spiral = np.full((1, 9, 9), -1)
    spiral[0, 0, :] = spiral[0, :, 8] = spiral[0, 8, :] = spiral[0, 2:, 0] = spiral[0, 2, :7] = spiral[0, 2:7, 6] = 0
    spiral[0, 6, 2:7] = spiral[0, 4:7, 2] = 0
    assert connected_components(spiral).max() == 1


def test_numbers_ascend_with_the_images():
    labels = connected_components(np.zeros((4, 3, 3), int))
    assert labels[:, 0, 0].tolist() == [1, 2, 3, 4]


def test_nothing_has_no_components():
    assert connected_components(np.full((2, 4, 4), -1)).max() == 0


def test_touching_discs_are_cut_between_them():
    y, x = np.mgrid[:20, :40]
    for centres in ([(8, 10), (17, 10)], [(8, 10), (17, 10), (26, 10)]):
        points = np.argwhere(np.any([np.hypot(x - a, y - b) < 5 for a, b in centres], axis=0))[:, ::-1]
        part = compact_parts(points.astype(float), len(centres))
        means = sorted(points[part == k].mean(0).round(1).tolist() for k in range(len(centres)))
        assert np.allclose(means, centres, atol=0.5)
