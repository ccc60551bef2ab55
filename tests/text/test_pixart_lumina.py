from __future__ import annotations

import shutil

import pytest
import torch

from emf_lightning.text.pixart_lumina import Lumina2TextEncoder, PixArtTextEncoder
from tests import pipelines, tiny_checkpoints

CAPTIONS = ["A Red CAT ", "a photo of two blue dog and a cat and a dog and a cat"]


def same(encoder, expected, mask, null, null_mask) -> None:
    for features, theirs, kept in (
        (encoder(CAPTIONS), expected, mask),
        (encoder([""] * 2), null, null_mask),
        (encoder([CAPTIONS[0], ""])[1:], null[:1], null_mask[:1]),
    ):
        assert torch.equal(features.mask, kept.bool())
        assert torch.allclose(features.context[features.mask], theirs[features.mask], atol=1e-5)
        assert features.context.shape == (len(kept), encoder.length, encoder.width)


@pytest.mark.parametrize("length", [6, 20])
def test_pixart_s_features_are_the_pipelines_own(tmp_path, length):
    from diffusers import PixArtSigmaPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    torch.manual_seed(0)
    pipelines.t5(tmp_path)
    parts = (
        AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
        T5EncoderModel.from_pretrained(tmp_path / "text_encoder"),
    )
    stock = PixArtSigmaPipeline(*parts, None, None, None)
    with torch.no_grad():
        theirs = stock.encode_prompt(CAPTIONS, max_sequence_length=length, device="cpu")
    encoder = PixArtTextEncoder(str(tmp_path), length=length, dtype="float32")
    same(encoder, *theirs)
    assert encoder.truncated == (1 if length == 6 else 0)


@pytest.mark.parametrize("length", [24, 60])
def test_lumina_s_features_are_the_pipelines_own(tmp_path, length):
    from diffusers import Lumina2Pipeline
    from transformers import AutoTokenizer, Gemma2Model

    tiny_checkpoints.language_model(tmp_path / "text_encoder", "Gemma2")
    shutil.copytree(tmp_path / "text_encoder", tmp_path / "tokenizer")
    model = Gemma2Model.from_pretrained(tmp_path / "text_encoder").eval()
    stock = Lumina2Pipeline(None, None, None, model, AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    encoder = Lumina2TextEncoder(str(tmp_path), length=length, dtype="float32")
    with torch.no_grad():
        expected, mask, null, null_mask = stock.encode_prompt(CAPTIONS, max_sequence_length=length, device="cpu")
        *_, negative, kept = stock.encode_prompt(
            ["a"], negative_prompt=["blurry"], max_sequence_length=length, device="cpu"
        )
    same(encoder, expected, mask, null, null_mask)
    features = encoder(["blurry"], negative=True)
    assert torch.equal(features.mask, kept.bool())
    assert torch.allclose(features.context[features.mask], negative[features.mask], atol=1e-5)
