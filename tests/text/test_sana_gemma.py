from __future__ import annotations

import pytest
import torch

from emf_lightning.text.sana_gemma import SanaGemma, sana_instruction
from tests import tiny_checkpoints


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A folder with a tiny Gemma-2."""
    folder = tmp_path_factory.mktemp("gemma")
    tiny_checkpoints.language_model(folder, "Gemma2")
    return folder


CAPTIONS = ["A Red cube on a blue ball ", "two ring", "a photo of a cube and a ball under a ring and a cube on a ball"]


@pytest.mark.parametrize("instruction", [None, ""])
@pytest.mark.parametrize("length", [6, 12, 40])
def test_features_are_those_of_diffusers_own_pipeline(gemma, tmp_path, length, instruction):
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline
    from transformers import AutoTokenizer, Gemma2Model

    model = Gemma2Model.from_pretrained(gemma).eval()
    parts = (
        AutoTokenizer.from_pretrained(gemma),
        model,
        tiny_checkpoints.dc_ae(tmp_path),
        tiny_checkpoints.sana(tmp_path),
    )
    pipeline = SanaPipeline(*parts, DPMSolverMultistepScheduler())
    encoder = SanaGemma(str(gemma), length=length, dtype="float32", instruction=instruction)
    lines = sana_instruction().split("\n") if instruction is None else None
    with torch.no_grad():
        expected, mask, null, null_mask = pipeline.encode_prompt(
            CAPTIONS, max_sequence_length=length, complex_human_instruction=lines
        )
        negative = pipeline.encode_prompt(["a"], negative_prompt="blurry ring", max_sequence_length=length)[2:]
    for features, theirs, kept in (
        (encoder(CAPTIONS), expected, mask),
        (encoder([""] * len(CAPTIONS)), null, null_mask),
        (encoder(["blurry ring"], negative=True), *negative),
        (encoder([CAPTIONS[0], ""])[1:], null[:1], null_mask[:1]),
    ):
        assert torch.equal(features.mask, kept.bool())
        assert torch.allclose(features.context[features.mask], theirs[features.mask], atol=1e-5)
        assert features.context.shape == (len(kept), length, 16)


def test_a_caption_that_loses_its_end_is_counted(gemma):
    encoder = SanaGemma(str(gemma), length=6, dtype="float32")
    with pytest.warns(UserWarning, match="1 of 2 captions"):
        encoder([CAPTIONS[1], CAPTIONS[2]])
    assert encoder.truncated == 1


def test_another_instruction_is_another_encoder(gemma):
    theirs, ours = SanaGemma(str(gemma)), SanaGemma(str(gemma), instruction="a photo of ")
    assert theirs.fingerprint != ours.fingerprint
    assert not torch.allclose(theirs(CAPTIONS).context[:, :1], ours(CAPTIONS).context[:, 1:2])
