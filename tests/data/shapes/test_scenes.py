from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from emf_lightning.data.geneval_prompts import TASKS, Prompt
from emf_lightning.data.shapes.prompts import evaluation_prompts, random_prompt
from emf_lightning.data.shapes.rendering import object_alpha
from emf_lightning.data.shapes.scenes import TASK_WEIGHTS, Scene, scene_for, training_scene
from emf_lightning.data.shapes.world import FULL, SMALL

WORLDS = pytest.mark.parametrize("world", [SMALL, FULL], ids=lambda world: world.name)


def shows(scene: Scene, prompt: Prompt) -> bool:
    """True if the objects satisfy the prompt, by their names and centres alone."""
    wanted = sorted((item["class"], item["count"]) for item in prompt.include)
    shapes = [o.shape for o in scene.objects]
    if wanted != sorted((shape, shapes.count(shape)) for shape in set(shapes)):
        return False
    for item in prompt.include:
        objects = [o for o in scene.objects if o.shape == item["class"]]
        if "color" in item and {o.colour for o in objects} != {item["color"]}:
            return False
        if "position" in item:
            relation, index = item["position"]
            (target,) = [o for o in scene.objects if o.shape == prompt.include[index]["class"]]
            dx, dy = np.subtract(objects[0].centre, target.centre)
            along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
            sign = -1 if relation in ("left of", "above") else 1
            if not (sign * along > 0 and abs(along) > 2 * abs(across)):
                return False
    return True


@WORLDS
@pytest.mark.parametrize("tag", TASKS)
def test_scenes_show_their_prompt(world, tag):
    rng = np.random.default_rng(0)
    for _ in range(100):
        prompt = random_prompt(world, tag, rng)
        assert prompt.tag == tag
        assert shows(scene_for(world, prompt, rng), prompt), prompt.prompt


@WORLDS
def test_the_other_relations_are_not_shown(world):
    rng = np.random.default_rng(1)
    prompts = [prompt for prompt in evaluation_prompts(world, 30) if prompt.tag == "position"]
    for prompt in prompts:
        scene = scene_for(world, prompt, rng)
        reference, subject = prompt.include
        for relation in {"left of", "right of", "above", "below"} - {subject["position"][0]}:
            other = replace(prompt, include=(reference, subject | {"position": (relation, 0)}))
            assert not shows(scene, other)


@WORLDS
def test_objects_lie_within_the_canvas_and_apart(world):
    rng = np.random.default_rng(2)
    for _ in range(60):
        scene = training_scene(world, rng)
        alphas = [object_alpha(o.shape, o.centre, o.radius, world.canvas) for o in scene.objects]
        for o, alpha in zip(scene.objects, alphas, strict=True):
            wide = object_alpha(o.shape, (o.centre[0] + 8, o.centre[1] + 8), o.radius, world.canvas + 16)
            assert alpha.sum() == pytest.approx(wide.sum(), rel=1e-5)  # nothing is cut off
            least, most = (fraction * world.cell for fraction in world.radius)
            assert least <= o.radius <= most
        assert np.sum(alphas, axis=0).max() <= 1 + 1e-6


@WORLDS
def test_training_never_shows_a_held_out_composition(world):
    rng = np.random.default_rng(3)
    for _ in range(1000):
        scene = training_scene(world, rng)
        assert not scene.prompt.held_out
        assert not world.held_out_pairs & {(o.colour, o.shape) for o in scene.objects}
        if len({o.shape for o in scene.objects}) > 1:
            assert frozenset(o.shape for o in scene.objects) not in world.held_out_shape_pairs


def test_held_out_compositions_can_be_rendered_for_evaluation():
    rng = np.random.default_rng(4)
    held_out = [prompt for prompt in evaluation_prompts(SMALL) if prompt.held_out]
    assert {prompt.tag for prompt in held_out} == {"two_object", "colors", "position", "color_attr"}
    assert all(shows(scene_for(SMALL, prompt, rng), prompt) for prompt in held_out)


def test_tasks_are_sampled_by_their_weights():
    rng = np.random.default_rng(5)
    assert sum(TASK_WEIGHTS.values()) == pytest.approx(1)
    tags = [training_scene(SMALL, rng, {tag: float(tag == "counting") for tag in TASKS}).prompt.tag for _ in range(20)]
    assert set(tags) == {"counting"}


def test_scenes_are_a_function_of_the_generator():
    prompts = evaluation_prompts(SMALL, 5)
    first, second = ([scene_for(SMALL, p, np.random.default_rng(i)) for i, p in enumerate(prompts)] for _ in range(2))
    assert first == second
    assert first[0] != scene_for(SMALL, prompts[0], np.random.default_rng(99))


def test_an_unknown_task_is_an_error():
    with pytest.raises(ValueError, match="unknown task 'poetry'; the tasks are single_object"):
        random_prompt(SMALL, "poetry", np.random.default_rng(0))
