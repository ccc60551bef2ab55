from __future__ import annotations

from emf_lightning.data.geneval_prompts import counting, plural, position, sample_prompts, single_object, with_article


def test_records_are_those_of_geneval():
    assert single_object("circle").metadata() == {
        "tag": "single_object",
        "include": [{"class": "circle", "count": 1}],
        "prompt": "a photo of a circle",
        "held_out": False,
    }
    three = counting("cross", 3)
    assert three.prompt == "a photo of three crosses"
    assert three.metadata()["exclude"] == [{"class": "cross", "count": 4}]


def test_the_reference_object_of_a_position_comes_first():
    prompt = position("circle", "left of", "square")
    assert prompt.prompt == "a photo of a circle left of a square"
    assert prompt.include == (
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "position": ("left of", 0)},
    )


def test_words_follow_the_published_generator():
    assert with_article("orange") == "an orange"
    assert with_article("cross") == "a cross"
    assert (plural("cross"), plural("star")) == ("crosses", "stars")


def test_colourless_classes_never_get_a_colour():
    prompts = sample_prompts(["person", "dog", "cup"], ["red", "blue"], per_task=20, seed=0, colourless=1)
    coloured = {item["class"] for prompt in prompts for item in prompt.include if "color" in item}
    assert coloured == {"dog", "cup"}
    assert len(prompts) == 3 + 5 * 20
