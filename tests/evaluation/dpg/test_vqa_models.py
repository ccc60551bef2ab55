from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from emf_lightning.evaluation.dpg.vqa_models import BlipVqa, MplugVqa, QwenVqa
from tests.evaluation.tiny_blip import save_tiny_blip

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> str:
    return save_tiny_blip(tmp_path_factory.mktemp("blip"))


def test_blip_answers_each_question_the_same_alone_and_in_any_company(blip):
    words = ["is", "there", "a", "dog", "cat", "?", "yes", "no"]
    rng = np.random.default_rng(0)
    questions = [" ".join(rng.choice(words, length)) for length in (1, 2, 12) * 8]
    together = BlipVqa(blip, device="cpu", batch_size=7).answer(IMAGE, questions)
    model = BlipVqa(blip, device="cpu", batch_size=1)

    assert together == [model.answer(IMAGE, [question])[0] for question in questions]
    assert len(set(together)) > 5, "the questions have no say"
    assert all(answer == answer.lower().strip() for answer in together)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda weights: {n: w for n, w in weights.items() if "text_encoder" not in n},
            r"lacks \d\d of the weights of a Blip.*",
        ),
        (
            lambda weights: weights | {"vision_model.post_layernorm.weight": torch.ones(4)},
            r"lacks 1 of the weights .*post_layernorm\.weight among.*",
        ),
    ],
    ids=["a captioning model", "another size"],
)
def test_weights_that_do_not_fill_the_model_are_refused(blip, tmp_path, spoil, said):
    shutil.copytree(blip, tmp_path, dirs_exist_ok=True)
    save_file(spoil(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"BlipVqa: model=.* {said}hf download"):
        BlipVqa(str(tmp_path), device="cpu")


def test_settings_tell_models_with_other_weights_apart(blip, tmp_path):
    shutil.copytree(blip, tmp_path / Path(blip).name)
    file = tmp_path / Path(blip).name / "model.safetensors"
    weights = load_file(file)
    weights["vision_model.post_layernorm.weight"] *= 2
    save_file(weights, file, {"format": "pt"})
    one, other = (BlipVqa(str(folder), device="cpu").settings() for folder in (blip, file.parent))

    assert one["judge_model"] == other["judge_model"] == Path(blip).name
    assert one["judge_weights"] != other["judge_weights"]
    assert one == BlipVqa(blip, device="cpu", batch_size=2).settings()


CHAT = (
    "{% for m in messages %}<|im_start|>{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("qwen")
    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocabulary = [
        "<pad>",
        "<unk>",
        *marks,
        *["is", "there", "a", "dog", "cat", "?", "yes", "no", "Answer", "or", ",", "in", "one", "word", "."],
    ]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=marks, **names)
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessor(min_pixels=64, max_pixels=4096, **patches)
    Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(**patches), chat_template=CHAT).save_pretrained(folder)
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    }
    ids = {
        name: vocabulary.index(mark)
        for name, mark in zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), marks[2:], strict=True
        )
    }
    torch.manual_seed(2)
    network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    with torch.no_grad():
        network.lm_head.weight.mul_(50)  # far from a tie between words
    network.save_pretrained(folder)
    return str(folder)


def test_a_chat_model_is_shown_the_image_and_answers_in_plain_words(qwen):
    model = QwenVqa(qwen, device="cpu", dtype="float32")
    answers = model.answer(IMAGE, ["is there a dog ?", "is there a cat ?"])

    assert len(answers) == 2
    assert all(answer and answer == answer.lower().strip() and "<" not in answer for answer in answers)
    assert model.answer(np.zeros_like(IMAGE), ["is there a dog ?"]) != answers[:1], "the image has no effect"


@pytest.mark.parametrize("kind", [BlipVqa, QwenVqa])
def test_missing_weights_are_named_with_the_remedy(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: cannot load model='no/model'.*hf download no/model"):
        kind("no/model")


def test_the_original_model_needs_a_package_that_is_named():
    with pytest.raises(ValueError, match="MplugVqa: the package modelscope is not installed"):
        MplugVqa()
