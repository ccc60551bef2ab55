from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
)

from emf_lightning.evaluation.vqa_judge import BlipJudge, MplugJudge, QwenVlJudge

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[DEC]",
    "[ENC]",
    "is",
    "there",
    "a",
    "dog",
    "cat",
    "?",
    "yes",
    "no",
]


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 5,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(processor, BertTokenizerFast(str(folder / "vocab.txt"))).save_pretrained(folder)
    return str(folder)


def test_blip_answers_each_question_the_same_alone_and_in_a_batch(blip):
    questions = ["is there a dog ?", "is there a cat ?", "a dog ?"]
    together = BlipJudge(blip, device="cpu").answer(IMAGE, questions)
    alone = [BlipJudge(blip, device="cpu", batch_size=1).answer(IMAGE, [question])[0] for question in questions]

    assert together == alone
    assert all(answer == answer.lower().strip() for answer in together)


@pytest.mark.parametrize("kind", [BlipJudge, QwenVlJudge])
def test_missing_weights_are_named_with_the_remedy(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: cannot load model='no/judge'.*hf download no/judge"):
        kind("no/judge")


def test_the_original_judge_needs_a_package_that_is_named():
    with pytest.raises(ValueError, match="MplugJudge: the package modelscope is not installed"):
        MplugJudge()
