from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from emf_lightning.data.geneval_prompts import TASKS, colors
from emf_lightning.data.shapes.prompts import evaluation_prompts
from emf_lightning.data.shapes.scenes import scene_for
from emf_lightning.data.shapes.world import SMALL
from emf_lightning.evaluation.shapes.suite import ShapesSuite

SUITE = ShapesSuite(per_task=8, scenes_per_task=10)


def test_every_task_gets_as_many_images_whatever_its_number_of_prompts():
    images = SUITE.images(12)

    assert Counter(image.prompt.tag for image in images) == dict.fromkeys(TASKS, 12)
    assert len({(image.prompt.prompt, image.index) for image in images}) == len(images)
    single = [image for image in images if image.prompt.tag == "single_object"]
    assert [image.index for image in single] == [0] * 5 + [1] * 5 + [2] * 2


def test_few_images_are_a_beginning_of_many():
    few, many = SUITE.images(3), SUITE.images(20)
    assert all(image in many for image in few)


def test_prompts_are_the_worlds():
    assert list(ShapesSuite("small").prompts()) == evaluation_prompts(SMALL)


def test_clean_scenes_score_the_ceiling_and_other_scenes_of_the_task_hardly_anything():
    assert SUITE.ceiling().overall == 1
    assert SUITE.chance().overall < 0.1
    assert SUITE.ceiling() is SUITE.ceiling(), "not kept"


def test_an_image_is_evaluated_by_its_prompt():
    red = colors("red", "circle")
    image = scene_for(SMALL, red, np.random.default_rng(0)).render(SMALL)

    assert SUITE.evaluate(image, red).strict
    assert not SUITE.evaluate(image, colors("blue", "circle")).correct
    assert not SUITE.evaluate(np.full_like(image, 153), red).correct


def test_an_unknown_world_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="no world 'huge'; the worlds are small, full"):
        ShapesSuite("huge")


@pytest.mark.parametrize("world", ["small", "full"])
def test_a_task_of_one_prompt_has_chance_scores_by_the_worlds_other_prompts(world):
    suite = ShapesSuite(world, per_task=1, scenes_per_task=10)
    assert Counter(prompt.tag for prompt in suite.prompts())["two_object"] == 1

    assert suite.ceiling().overall == 1
    assert suite.chance().overall < 0.5
    assert set(suite.chance().correct) == set(TASKS)


@pytest.mark.parametrize("argument", ["per_task", "scenes_per_task"])
@pytest.mark.parametrize("value", [0, -1])
def test_no_prompts_or_scenes_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"ShapesSuite: {argument} must be at least 1, got {value}"):
        ShapesSuite(**{argument: value})
