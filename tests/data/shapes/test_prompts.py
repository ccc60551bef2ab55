from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest

from emf_lightning.data.geneval_prompts import TASKS
from emf_lightning.data.shapes.prompts import evaluation_prompts
from emf_lightning.data.shapes.world import FULL, SMALL, WORLDS

DIGESTS = {
    "small": "c217d57a0ca88894d894f02820ebe1f5198225b5dc2f15f61af75be13724e92d",
    "full": "7f9b0a1f392ac7fc5737102dffea9bb56fb33cb583d70ec28c477b37743551ac",
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_evaluation_prompts_never_change(name):
    records = [prompt.metadata() for prompt in evaluation_prompts(WORLDS[name])]
    digest = hashlib.sha256("\n".join(json.dumps(record) for record in records).encode()).hexdigest()
    assert digest == DIGESTS[name], "other prompts: scores published before no longer compare"


@pytest.mark.parametrize("world", [SMALL, FULL], ids=lambda world: world.name)
def test_prompts_come_task_by_task_and_once_each(world):
    prompts = evaluation_prompts(world)
    tags = [prompt.tag for prompt in prompts]
    assert tuple(dict.fromkeys(tags)) == TASKS
    assert tags == sorted(tags, key=TASKS.index)
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)
    counts = Counter(tags)
    assert counts["single_object"] == len(world.shapes)
    assert counts["counting"] == len(world.shapes) * 3
    assert max(counts.values()) <= 100


def test_a_smaller_list_holds_the_tasks_too():
    assert Counter(prompt.tag for prompt in evaluation_prompts(SMALL, 4)).keys() == set(TASKS)


def test_held_out_compositions_are_marked():
    marked = {prompt.prompt for prompt in evaluation_prompts(SMALL) if prompt.held_out}
    assert "a photo of a pink circle" in marked
    assert any("circle" in text and "cross" in text for text in marked)
    assert not any(
        prompt.held_out for prompt in evaluation_prompts(SMALL) if prompt.tag in ("single_object", "counting")
    )
