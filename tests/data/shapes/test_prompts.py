from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from emf_lightning.data.geneval_prompts import TASKS
from emf_lightning.data.shapes.prompts import evaluation_prompts, write_captions
from emf_lightning.data.shapes.scenes import TASK_WEIGHTS
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


def test_captions_to_sample_from_show_all_compositions_in_the_training_images_shares(tmp_path):
    written = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        write_captions(tmp_path / "new" / name, SMALL, 2000, seed, TASK_WEIGHTS)
        written.append((tmp_path / "new" / name).read_text().splitlines())
    assert written[0] == written[1] != written[2]
    assert len(written[0]) == 2000
    known = {prompt.prompt: prompt for prompt in evaluation_prompts(SMALL, 400)}
    prompts = [known[caption] for caption in written[0] if caption in known]
    assert {prompt.tag for prompt in prompts if prompt.held_out} == {"two_object", "colors", "position", "color_attr"}
    counting = np.mean(["two" in c or "three" in c or "four" in c for c in written[0]])
    assert counting == pytest.approx(TASK_WEIGHTS["counting"], abs=0.03)


def test_held_out_compositions_are_marked():
    marked = {prompt.prompt for prompt in evaluation_prompts(SMALL) if prompt.held_out}
    assert "a photo of a pink circle" in marked
    assert any("circle" in text and "cross" in text for text in marked)
    assert not any(
        prompt.held_out for prompt in evaluation_prompts(SMALL) if prompt.tag in ("single_object", "counting")
    )
