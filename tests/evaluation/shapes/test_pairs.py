from __future__ import annotations

import numpy as np
import pytest

from emf_lightning.data.geneval_prompts import color_attr
from emf_lightning.data.shapes.scenes import Scene, SceneObject
from emf_lightning.data.shapes.world import SMALL
from emf_lightning.evaluation.shapes.pairs import ShapesPairs, facts_of


def scene(*objects: tuple[str, str, float, float]) -> Scene:
    prompt = color_attr(("red", "circle"), ("blue", "square"))
    return Scene(prompt, tuple(SceneObject(c, s, (x, y), 4.0) for c, s, x, y in objects))


def f1(a: Scene, b: Scene) -> float:
    """By hand, fact by fact."""
    mine, theirs = list(facts_of(a).elements()), list(facts_of(b).elements())
    left = list(theirs)
    common = 0
    for fact in mine:
        if fact in left:
            left.remove(fact)
            common += 1
    return 2 * common / (len(mine) + len(theirs))


RED_CIRCLE = ("red", "circle", 6.0, 6.0)
BLUE_SQUARE = ("blue", "square", 30.0, 6.0)


def test_facts_are_shapes_colours_their_binding_and_relations():
    facts = facts_of(scene(RED_CIRCLE, BLUE_SQUARE))
    assert set(facts) == {
        ("shape", "circle"),
        ("colour", "red"),
        ("object", "red", "circle"),
        ("shape", "square"),
        ("colour", "blue"),
        ("object", "blue", "square"),
        ("relation", "circle", "left of", "square"),
    }


def test_exchanged_colours_share_parts_but_no_objects():
    exchanged = scene(("blue", "circle", 6.0, 6.0), ("red", "square", 30.0, 6.0))
    assert f1(scene(RED_CIRCLE, BLUE_SQUARE), exchanged) == pytest.approx(2 * 5 / 14)
    assert f1(scene(RED_CIRCLE, BLUE_SQUARE), scene(RED_CIRCLE, BLUE_SQUARE)) == 1
    assert f1(scene(RED_CIRCLE), scene(("green", "cross", 6.0, 6.0))) == 0


def test_similarities_of_a_corpus_are_the_f1_of_its_scenes():
    corpus = ShapesPairs(count=40)
    others = np.arange(40)
    for query in (0, 7):
        expected = [f1(corpus.scenes[query], corpus.scenes[other]) for other in others]
        np.testing.assert_allclose(corpus.similarity(query, others), expected)
    assert corpus.similarity(3, np.array([3])) == 1
    np.testing.assert_array_equal(corpus.image(3), corpus.scenes[3].render(SMALL))


def test_unknown_worlds_and_counts_are_refused():
    with pytest.raises(ValueError, match="no world 'huge'"):
        ShapesPairs("huge")
    with pytest.raises(ValueError, match="count must be at least 2"):
        ShapesPairs(count=1)
