from __future__ import annotations

import shutil
import warnings

import pytest
import torch

from emf_lightning.text.no_text import NoText
from emf_lightning.text.stable_diffusion import FluxTextEncoder, SD3TextEncoder, StableDiffusionTextEncoder
from tests import pipelines

CAPTIONS = ["a red cat", "a photo of two blue dog and a cat", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "sd15": str(pipelines.stable_diffusion_15(root / "sd15")),
        "sd3": str(pipelines.stable_diffusion_3(root / "sd3")),
        "flux": str(pipelines.flux(root / "flux")),
    }


def test_sd3_features_are_the_pipelines_own(folders):
    from diffusers import StableDiffusion3Pipeline

    encoder = SD3TextEncoder(folders["sd3"], t5_length=12, dtype="float32")
    stock = StableDiffusion3Pipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=encoder.towers[0],
        text_encoder_2=encoder.towers[1],
        text_encoder_3=encoder.towers[2],
        tokenizer=_limited(encoder.tokenizers[0]),
        tokenizer_2=_limited(encoder.tokenizers[1]),
        tokenizer_3=encoder.tokenizers[2],
    )
    with torch.no_grad():
        sequence, _, pooled, _ = stock.encode_prompt(
            CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=12, device="cpu"
        )
    features = encoder(CAPTIONS)
    assert features.context.shape == (3, encoder.length, encoder.width) == (3, 1 + 77 + 12, 40)
    assert features.mask.all()
    assert torch.allclose(features.context[:, 1:], sequence, atol=1e-5)
    assert torch.allclose(features.context[:, 0, :24], pooled, atol=1e-5)
    assert not features.context[:, 0, 24:].any()
    assert not torch.allclose(features.context[0], features.context[1], atol=1e-2)


def test_flux_features_are_the_pipelines_own(folders):
    from diffusers import FluxPipeline

    encoder = FluxTextEncoder(folders["flux"], t5_length=12, dtype="float32")
    towers, tokenizers = encoder.towers, encoder.tokenizers
    stock = FluxPipeline(None, None, towers[0], _limited(tokenizers[0]), towers[1], tokenizers[1], None)
    with torch.no_grad():
        sequence, pooled, _ = stock.encode_prompt(CAPTIONS, None, max_sequence_length=12, device="cpu")
    features = encoder(CAPTIONS)
    assert features.context.shape == (3, encoder.length, encoder.width) == (3, 1 + 12, 40)
    assert features.mask.all()
    assert torch.allclose(features.context[:, 1:], sequence, atol=1e-5)
    assert torch.allclose(features.context[:, 0, :16], pooled, atol=1e-5)
    assert not features.context[:, 0, 16:].any()


def _limited(tokenizer):
    tokenizer.model_max_length = 77  # the pipeline reads CLIP's length off its tokenizer
    return tokenizer


def test_stable_diffusions_features_are_clips_at_all_positions(folders):
    from transformers import AutoTokenizer, CLIPTextModel

    encoder = StableDiffusionTextEncoder(folders["sd15"])
    tower = CLIPTextModel.from_pretrained(folders["sd15"], subfolder="text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["sd15"], subfolder="tokenizer")
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = tower(ids).last_hidden_state
    features = encoder(CAPTIONS)
    assert torch.allclose(features.context, expected, atol=1e-5)
    assert features.mask.all()
    assert (encoder.length, encoder.width) == (77, 16)


@pytest.mark.parametrize("kind", ["sd15", "sd3", "flux"])
def test_captions_that_lose_their_end_are_counted_and_said_once(folders, kind):
    long = " ".join(["cat"] * 90)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder = _encoder(folders, kind)
        encoder(["a cat", long])
        encoder([long])
    assert encoder.truncated == 2
    assert {str(w.message).partition(":")[0] for w in caught if "lose their end" in str(w.message)} >= {
        type(encoder).__name__
    }


def _encoder(folders, kind: str, **settings):
    if kind == "sd15":
        return StableDiffusionTextEncoder(folders["sd15"], **settings)
    encoder = FluxTextEncoder if kind == "flux" else SD3TextEncoder
    return encoder(folders[kind], **({"t5_length": 12, "dtype": "float32"} | settings))


@pytest.mark.parametrize("kind", ["sd15", "sd3", "flux"])
def test_fingerprint_is_of_what_the_features_depend_on(folders, kind):
    encoder = _encoder(folders, kind)
    assert encoder.fingerprint == _encoder(folders, kind).fingerprint
    assert encoder.fingerprint != _encoder(folders, kind, dtype="bfloat16").fingerprint
    with torch.no_grad():
        changed = _encoder(folders, kind)
        next(changed.parameters()).add_(1)
    assert encoder.fingerprint != changed.fingerprint


def test_published_sizes_build_on_the_meta_device():
    """CLIP-L 124 M, OpenCLIP bigG 695 M and T5-XXL's encoder 4.76 B."""
    with torch.device("meta"):
        encoder = SD3TextEncoder("stabilityai/stable-diffusion-3-medium-diffusers")
        flux = FluxTextEncoder("black-forest-labs/FLUX.1-dev")
        alone = StableDiffusionTextEncoder("XCLiu/2_rectified_flow_from_sd_1_5")
    sizes = [sum(p.numel() for p in tower.parameters()) for tower in encoder.towers]
    assert sizes == [123_650_304, 694_659_840, 4_762_310_656]
    assert (encoder.length, encoder.width) == (334, 4096)
    assert [sum(p.numel() for p in tower.parameters()) for tower in flux.towers] == [123_060_480, 4_762_310_656]
    assert (flux.length, flux.width) == (513, 4096)
    assert sum(p.numel() for p in alone.parameters()) == 123_060_480


def test_a_pipeline_that_is_not_there_or_not_whole_is_one_sentence(folders, tmp_path):
    with pytest.raises(ValueError, match=r"cannot load text_encoder of pretrained='nowhere' .*hf download nowhere"):
        StableDiffusionTextEncoder("nowhere")
    part = tmp_path / "sd3"
    shutil.copytree(folders["sd3"], part)
    shutil.rmtree(part / "text_encoder_3")
    with pytest.raises(ValueError, match="cannot load text_encoder_3"):
        SD3TextEncoder(str(part))


def test_no_text_is_one_token_for_any_caption():
    encoder = NoText()
    features = encoder(["a cat", ""])
    assert features.context.shape == (2, encoder.length, encoder.width)
    assert not features.context.any()
    assert features.mask.all()
