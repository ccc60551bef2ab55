from __future__ import annotations

import hashlib
import json
from collections import Counter

from emf_lightning.evaluation.geneval.coco_prompts import CLASSES, geneval_prompts

PROMPTS = geneval_prompts()


def test_the_553_records_are_the_published_ones_byte_by_byte():
    records = [{k: v for k, v in prompt.metadata().items() if k != "held_out"} for prompt in PROMPTS]
    file = "".join(json.dumps(record) + "\n" for record in records)

    assert len(records) == 553
    # the digest of GenEval's evaluation_metadata.jsonl
    assert hashlib.sha256(file.encode()).hexdigest() == (
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    )


def test_prompts_known_from_publications_have_their_numbers():
    # a number out of 553 and its prompt, as papers and other evaluators show them
    known = {
        16: "a photo of a skateboard",
        88: "a photo of a horse and a computer keyboard",
        344: "a photo of a red backpack",
        368: "a photo of a baseball glove below an umbrella",
        393: "a photo of a hair drier left of a toilet",
        504: "a photo of a yellow pizza and a green oven",
        552: "a photo of a blue pizza and a yellow baseball glove",
    }
    assert {number: PROMPTS[number].prompt for number in known} == known


def test_tasks_have_the_published_sizes_and_every_text_is_one_record():
    assert Counter(prompt.tag for prompt in PROMPTS) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert len({prompt.prompt for prompt in PROMPTS}) == 553


def test_no_person_has_a_colour():
    coloured = [item["class"] for prompt in PROMPTS for item in prompt.include if "color" in item]
    assert len(coloured) == 94 + 200
    assert "person" not in coloured


def test_classes_are_cocos_things_under_genevals_names():
    assert len(set(CLASSES)) == 80
    assert [CLASSES[i] for i in (0, 63, 64, 65, 66, 79)] == [
        "person",
        "laptop",
        "computer mouse",
        "tv remote",
        "computer keyboard",
        "toothbrush",
    ]
