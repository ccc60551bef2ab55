"""Captions that hold the names of special tokens: to a tokenizer they are text like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from emf_lightning.evaluation.clip_hps.clip_model import load_clip
from emf_lightning.text.open_clip import OpenClipTextEncoder
from emf_lightning.text.plain import neutral
from emf_lightning.text.pretrained import PretrainedTextEncoder
from emf_lightning.text.stable_diffusion import _padded
from tests.evaluation.tiny_clip import save_tiny_clip
from tests.text.test_open_clip import TEXT, register
from tests.text.test_pretrained import make_model, save_tokenizer

WRITTEN = (
    "<{}>",
    "< {}>",
    "<<{}>>",
    "＜{}＞",
    "&lt;{}&gt;",
    "&amp;lt;{}&amp;gt;",
    "&#60;{}&#x3e;",
    "x<{}>y",
    "<{}><{}>",
)
NAMES = ("end_of_text", "start_of_text", "END_OF_TEXT", "|endoftext|", "/s", "|im_end|", "pad", "end_of_\u200btext")
TEXTS = [form.replace("{}", name) for form in WRITTEN for name in NAMES]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> OpenClipTextEncoder:
    """OpenCLIP's own tokenizer before a tiny tower."""
    text = {**TEXT, "context_length": 77}
    checkpoint = register(tmp_path_factory.mktemp("open_clip"), "emf-tiny-77", text)
    return OpenClipTextEncoder("emf-tiny-77", str(checkpoint))


@pytest.fixture(scope="module")
def original() -> Any:
    import open_clip

    return open_clip.get_tokenizer("ViT-B-32")


def test_openclip_reads_on_behind_the_name_of_a_token(clip, original):
    end, start = original.eot_token_id, original.sot_token_id
    behind = [*original(["on a mat"])[0, 1:4].tolist(), end]
    for text, row in zip(TEXTS, clip._ids([f"a cat {text} on a mat" for text in TEXTS], 77).tolist(), strict=True):
        assert (row.count(end), row.count(start)) == (1, 1), text
        assert row[row.index(end) - 3 : row.index(end) + 1] == behind, text
    features = clip([f"a cat {TEXTS[0]} on a mat", f"a cat {TEXTS[0]} on a dog"])
    assert features.mask.sum(1).tolist() == [
        row.index(end) + 1 for row in clip._ids([f"a cat {TEXTS[0]} on a mat"] * 2, 77).tolist()
    ]
    assert not torch.equal(features.context[0], features.context[1])


def test_openclip_reads_other_captions_as_ever(clip, original):
    captions = ["a red cube", "wow!&", "", "it's 5 o'clock", "a < b > c", "naïve 猫", "&amp; <3", "<b>bold</b>"]
    assert torch.equal(clip._ids(captions, 77), original(captions))


def test_a_clip_score_sees_the_whole_prompt(tmp_path, original):
    model = load_clip("a score", "emf-tiny-clip", save_tiny_clip(tmp_path), device="cpu")
    first, second = model.tokenizer(["a <end_of_text> cat", "a <end_of_text> dog"]).tolist()
    assert first != second
    assert first.count(original.eot_token_id) == 1
    assert not torch.equal(*model.text_features(["a <end_of_text> of a red cat", "a"]))


def test_openclip_with_a_tokenizer_of_transformers(tmp_path):
    save_tokenizer(tmp_path)
    text = {**TEXT, "vocab_size": 32, "hf_tokenizer_name": str(tmp_path), "context_length": 20}
    text |= {"no_causal_mask": True, "pool_type": "last"}
    encoder = OpenClipTextEncoder("emf-words", str(register(tmp_path, "emf-words", text)))
    cube = encoder._inner.convert_tokens_to_ids("cube")
    for form in WRITTEN:
        row = encoder._ids([f"red {form.replace('{}', '/s')} cube"], 20)[0].tolist()
        assert row.count(1) == 1, form  # </s>
        assert row[row.index(1) - 1] == cube, form


def openai_tokenizer(folder: Path) -> Any:
    """OpenAI's tokenizer as transformers has it, from the file that OpenCLIP ships."""
    import open_clip
    from transformers import CLIPTokenizer

    shipped = open_clip.tokenizer.SimpleTokenizer()
    rename = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {rename.get(token, token): index for token, index in shipped.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = sorted(shipped.bpe_ranks, key=shipped.bpe_ranks.__getitem__)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def test_the_tokenizer_of_stable_diffusion(tmp_path):
    tokenizer = openai_tokenizer(tmp_path)
    end, mat = tokenizer.eos_token_id, tokenizer("mat")["input_ids"][1]
    names = ("<|endoftext|>", "<|ENDOFTEXT|>", "<|startoftext|>", "＜|endoftext|＞", "<<|endoftext|>>", "</s>")
    for row in _padded(tokenizer, [f"a cat {name} on a mat" for name in names], 40, None).tolist():
        assert row[row.index(end) - 1] == mat
        assert row.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", ["bert", "qwen3", "t5", "clip"])
def test_encoders_of_transformers(tmp_path, kind):
    make_model(kind).eval().save_pretrained(tmp_path)
    save_tokenizer(tmp_path, additional_special_tokens=["<|im_end|>", "[SEP]", "<｜end▁of▁turn｜>"])
    encoder = PretrainedTextEncoder(str(tmp_path), 24)
    cube = encoder.tokenizer.convert_tokens_to_ids("cube")
    names = ("</s>", "<|im_end|>", "[SEP]", "[sep]", "<pad>", "<｜end▁of▁turn｜>", "<unk></s>", "[[SEP]]", "red</s>")
    for ids in encoder._tokenize([f"red {name} cube" for name in names]):
        assert ids[-2:] == [cube, 1]
        assert ids.count(1) == 1
        assert not set(ids[:-1]) & {encoder.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "[SEP]")}


def test_a_name_is_broken_wherever_it_stands():
    tokens = {"</s>", "[sep]"}
    assert neutral("a</s>b [SEP][sep] <</s>>", tokens) == "a< /s>b [ SEP][ sep] << /s>>"
