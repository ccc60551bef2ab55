from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from emf_lightning.data.geneval_prompts import Prompt, color_attr, colors, counting, position, single_object, two_object
from emf_lightning.evaluation.geneval.verdict import Detection, evaluate, relations


def seen(label: str, x: float, y: float, score: float = 0.99, colour: str | None = None, size: float = 10) -> Detection:
    """An object with its centre at (x, y)."""
    box = (x - size / 2, y - size / 2, x + size / 2, y + size / 2)
    return Detection(label, score, box, np.zeros((1, 1), bool), colour)


CIRCLE_LEFT_OF_SQUARE = position("circle", "left of", "square")
RED_CIRCLE_BLUE_SQUARE = color_attr(("red", "circle"), ("blue", "square"))


@pytest.mark.parametrize(
    ("prompt", "detections"),
    [
        (single_object("circle"), [seen("circle", 6, 6)]),
        (two_object("circle", "cross"), [seen("circle", 6, 6), seen("cross", 30, 6)]),
        (counting("circle", 3), [seen("circle", x, 6) for x in (6, 18, 30)]),
        (colors("red", "circle"), [seen("circle", 6, 6, colour="red")]),
        (CIRCLE_LEFT_OF_SQUARE, [seen("circle", 6, 6), seen("square", 30, 6)]),
        (RED_CIRCLE_BLUE_SQUARE, [seen("circle", 6, 6, colour="red"), seen("square", 30, 6, colour="blue")]),
    ],
    ids=lambda value: value.tag if isinstance(value, Prompt) else "",
)
def test_what_the_prompt_asks_for_is_correct_and_nothing_else_is(prompt, detections):
    verdict = evaluate(detections, prompt)
    assert (verdict.correct, verdict.strict, verdict.reason) == (True, True, "")
    assert not evaluate(detections[1:], prompt).correct
    assert evaluate([], prompt).reason


def test_exchanged_colours_fail_attribution_but_not_two_objects():
    exchanged = [seen("circle", 6, 6, colour="blue"), seen("square", 30, 6, colour="red")]
    verdict = evaluate(exchanged, RED_CIRCLE_BLUE_SQUARE)
    assert not verdict.correct
    assert "expected red circle>=1, found blue" in verdict.reason
    assert evaluate(exchanged, two_object("circle", "square")).correct


def test_the_mirror_image_shows_the_other_relation():
    mirrored = [seen("circle", 30, 6), seen("square", 6, 6)]
    assert not evaluate(mirrored, CIRCLE_LEFT_OF_SQUARE).correct
    assert evaluate(mirrored, position("circle", "right of", "square")).correct


def test_offsets_within_a_tenth_of_both_sizes_are_no_relation():
    assert relations((0, 0, 10, 10), (1.9, 0, 11.9, 10)) == set()
    assert relations((0, 0, 10, 10), (30, 0, 40, 10)) == {"left of"}
    assert relations((30, 0, 40, 10), (0, 0, 10, 10)) == {"right of"}
    assert relations((0, 0, 10, 10), (0, 30, 10, 40)) == {"above"}
    assert relations((0, 30, 10, 40), (0, 0, 10, 10)) == {"below"}


def test_the_shortened_offset_is_divided_by_the_full_one():
    # shortened by .1 * (10 + 10) = 2: 2 / 4 is not above .5, though 2 / 2 would be
    assert relations((0, 0, 10, 10), (4, 0, 14, 10)) == set()
    assert relations((0, 0, 10, 10), (4.1, 0, 14.1, 10)) == {"left of"}


def test_two_relations_hold_on_a_diagonal():
    assert relations((0, 0, 10, 10), (20, 20, 30, 30)) == {"left of", "above"}
    diagonal = [seen("circle", 6, 6), seen("square", 30, 30)]
    assert evaluate(diagonal, CIRCLE_LEFT_OF_SQUARE).correct
    assert evaluate(diagonal, position("circle", "above", "square")).correct


def test_one_object_too_many_fails_counting_only():
    four = [seen("circle", x, y) for x in (6, 30) for y in (6, 30)]
    verdict = evaluate(four, counting("circle", 3))
    assert not verdict.correct
    assert verdict.reason == "expected circle<4, found 4"
    single = evaluate(four, single_object("circle"))
    assert single.correct
    assert not single.strict


def test_counting_wants_more_confidence_than_the_other_tasks():
    doubtful = [seen("circle", 6, 6), seen("circle", 30, 6, score=0.85)]
    assert not evaluate(doubtful, counting("circle", 2)).correct
    assert evaluate([replace(d, score=0.85) for d in doubtful], single_object("circle")).correct


def test_scores_at_the_threshold_do_not_count():
    assert not evaluate([seen("circle", 6, 6, score=0.3)], single_object("circle")).correct
    assert evaluate([seen("circle", 6, 6, score=0.3001)], single_object("circle")).correct
    at_limit = [seen("circle", 6, 6, score=0.9), seen("circle", 30, 6, score=0.9)]
    assert not evaluate(at_limit, counting("circle", 2)).correct


def test_the_seventeenth_object_of_a_class_is_dropped():
    sixteen = Prompt(
        "counting", "sixteen circles", ({"class": "circle", "count": 16},), ({"class": "circle", "count": 17},)
    )
    crowd = [seen("circle", 2 * i, 6) for i in range(20)]
    assert evaluate(crowd, sixteen).correct
    assert not evaluate(crowd[:15], sixteen).correct


def test_identical_detections_count_twice():
    assert evaluate([seen("circle", 6, 6)] * 2, counting("circle", 2)).correct


def test_a_relation_to_what_is_missing_fails():
    verdict = evaluate([seen("circle", 6, 6)], CIRCLE_LEFT_OF_SQUARE)
    assert not verdict.correct
    assert "no target for circle to be left of" in verdict.reason


def test_a_reference_object_of_the_wrong_colour_is_no_target():
    prompt = Prompt(
        "position",
        "a circle left of a red square",
        (
            {"class": "square", "count": 1, "color": "red"},
            {"class": "circle", "count": 1, "position": ("left of", 0)},
        ),
    )
    verdict = evaluate([seen("circle", 6, 6), seen("square", 30, 6, colour="blue")], prompt)
    assert "no target" in verdict.reason


def test_what_must_not_be_there_fails_on_its_own():
    no_cross = Prompt("counting", "no cross", (), ({"class": "cross", "count": 1},))
    assert evaluate([seen("circle", 6, 6)], no_cross).correct
    assert not evaluate([seen("cross", 6, 6)], no_cross).correct


def test_colour_and_position_look_at_the_most_confident_object():
    circles = [seen("circle", 6, 6, colour="red"), seen("circle", 30, 30, score=0.95, colour="blue")]
    assert evaluate(circles, colors("red", "circle")).correct
    assert not evaluate(circles, colors("blue", "circle")).correct
    assert evaluate([*circles, seen("square", 18, 6)], CIRCLE_LEFT_OF_SQUARE).correct


def test_strict_counts_objects_of_every_class():
    circle = seen("circle", 6, 6)
    prompt = single_object("circle")
    assert evaluate([circle, seen("unknown", 30, 30, score=0.2)], prompt).strict
    verdict = evaluate([circle, seen("unknown", 30, 30)], prompt)
    assert (verdict.correct, verdict.strict) == (True, False)


def test_colours_may_be_read_by_someone_else():
    asked = []

    def all_red(detections, label):
        asked.append((len(detections), label))
        return ["red"] * len(detections)

    assert evaluate([seen("circle", 6, 6)] * 3, colors("red", "circle"), all_red).correct
    assert asked == [(1, "circle")]


def test_the_order_of_detections_does_not_matter():
    detections = [seen("circle", x, 6, colour=c) for x, c in ((6, "red"), (18, "blue"), (30, "red"))]
    detections += [seen("square", 18, 30)]
    prompts = [
        colors("red", "circle"),
        colors("blue", "circle"),
        position("circle", "above", "square"),
    ]
    expected = [evaluate(detections, prompt) for prompt in prompts]
    rng = random.Random(0)
    for _ in range(10):
        rng.shuffle(detections)
        assert [evaluate(detections, prompt) for prompt in prompts] == expected


def test_strict_counts_doubtful_objects_of_other_classes_in_counting_as_well():
    verdict = evaluate(
        [seen("circle", 6, 6), seen("circle", 30, 6), seen("cross", 18, 30, score=0.5)], counting("circle", 2)
    )
    assert (verdict.correct, verdict.strict) == (True, False)
