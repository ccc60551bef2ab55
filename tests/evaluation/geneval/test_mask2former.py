from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from emf_lightning.evaluation.geneval.detector import CLASSES
from emf_lightning.evaluation.geneval.mask2former import Mask2FormerDetector, instances, preprocess
from tests.evaluation.tiny_detector import save_tiny


def by_hand(class_logits, mask_logits, padded, resized, original):
    """Instances of all (query, class) pairs as mmdetection has them, in plain loops."""
    found = []
    probabilities = class_logits.softmax(-1)
    for query in range(len(class_logits)):
        masks = nn.functional.interpolate(mask_logits[None, query : query + 1], padded, mode="bilinear")
        masks = masks[:, :, : resized[0], : resized[1]]
        logits = nn.functional.interpolate(masks, original, mode="bilinear")[0, 0].numpy()
        on = logits > 0
        certainty = (1 / (1 + np.exp(-logits)))[on].sum() / (on.sum() + 1e-6)
        for label in range(class_logits.shape[1] - 1):
            score = float(probabilities[query, label]) * certainty
            if score > 0.3:
                y, x = np.nonzero(on)
                found.append((score, CLASSES[label], (x.min(), y.min(), x.max() + 1, y.max() + 1), on))
    return sorted(found, key=lambda item: -item[0])


def test_instances_are_those_of_mmdetection_on_a_padded_oblong_image():
    generator = torch.Generator().manual_seed(0)
    class_logits = torch.randn(12, 81, generator=generator) * 6
    mask_logits = torch.randn(12, 8, 10, generator=generator) * 3
    sizes = {"padded": (32, 40), "resized": (30, 37), "original": (61, 75)}
    expected = by_hand(class_logits, mask_logits, *sizes.values())
    found = instances(class_logits, mask_logits, **sizes)

    assert len(expected) > 5
    assert [d.label for d in found] == [label for _, label, _, _ in expected]
    for detection, (score, _, box, mask) in zip(found, expected, strict=True):
        assert detection.score == pytest.approx(score, abs=1e-5)
        assert detection.box == box
        np.testing.assert_array_equal(detection.mask, mask)


def test_one_query_may_be_two_instances_and_no_object_is_none():
    class_logits = torch.full((3, 81), -20.0)
    class_logits[0, [0, 1]] = 20.0  # person or bicycle, half and half
    class_logits[1, 80] = 20.0  # no object
    class_logits[2, 5] = 20.0  # a bus without a pixel
    masks = torch.stack([torch.full((4, 4), 9.0), torch.full((4, 4), 9.0), torch.full((4, 4), -9.0)])
    found = instances(class_logits, masks, padded=(16, 16), resized=(16, 16), original=(16, 16))

    assert sorted(d.label for d in found) == ["bicycle", "person"]
    assert all(d.score == pytest.approx(0.5, abs=1e-3) and d.box == (0, 0, 16, 16) for d in found)


def test_images_are_enlarged_normalised_and_filled_up():
    image = torch.full((400, 300, 3), 200, dtype=torch.uint8)
    inputs, size = preprocess(image)

    assert size == (1067, 800)
    assert inputs.shape == (1, 3, 1088, 800)
    red = (200 - 123.675) / 58.395
    assert inputs[0, 0, :1067].unique().item() == pytest.approx(red, abs=1e-5)
    assert inputs[0, :, 1067:].abs().max() == 0


def test_long_images_stop_at_the_longer_sides_limit():
    assert preprocess(torch.zeros(100, 400, 3, dtype=torch.uint8))[1] == (333, 1333)


def test_a_tiny_network_runs_on_an_image_of_any_shape(tmp_path):
    detector = Mask2FormerDetector(save_tiny(tmp_path), short_side=64)
    with torch.no_grad():  # make it see something
        detector.network.class_predictor.bias[17] = 30
    found = detector(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))

    assert found
    assert {d.label for d in found} == {"horse"}
    assert all(d.mask.shape == (50, 90) for d in found)
    assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_labels": 3}, "knows 3 classes, not COCO's 80 things"),
        ({"lost": "class_predictor"}, "lacks 2 of the weights of a Mask2Former.*, class_predictor.bias among them"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        Mask2FormerDetector(save_tiny(tmp_path, **arguments))


def test_no_weights_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"cannot load model='no/weights'.*hf download no/weights"):
        Mask2FormerDetector("no/weights")
