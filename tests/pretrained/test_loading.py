from __future__ import annotations

import json

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file

from emf_lightning.pretrained.loading import PretrainedWeights, load_pretrained, on_meta_device
from tests import tiny_checkpoints

FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(tmp_path) -> PretrainedWeights:
    tiny_checkpoints.sana(tmp_path)
    return PretrainedWeights(str(tmp_path), "transformer")


def load(source, **settings):
    return load_pretrained("Asker", SanaTransformer2DModel, source, **{"frozen": True} | settings)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_is_frozen_or_trains(source, frozen):
    model = load(source, frozen=frozen)
    assert model.training != frozen
    assert {parameter.requires_grad for parameter in model.parameters()} == {not frozen}


def test_precision_is_that_of_the_caller(source):
    assert {p.dtype for p in load(source, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_on_the_meta_device_there_is_the_size_alone(source):
    assert not on_meta_device()
    with torch.device("meta"):
        assert on_meta_device()
        model = load(source, dtype="bfloat16")
    weights = load_file(f"{source.path}/{FILE}")
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        n: w.shape for n, w in weights.items()
    }
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda weights: weights.pop("proj_out.bias"),
            r"lacks 1 of the weights of a Sana.*, proj_out\.bias among them",
        ),
        (
            lambda weights: weights.update({"proj_out.bias": torch.ones(3)}),
            r"lacks 1 of the weights .* or has them in other shapes",
        ),
        (
            lambda weights: weights.update({"odd": torch.ones(3)}),
            "has 1 too many of the weights of a Sana.*, odd among",
        ),
    ],
    ids=["missing", "another shape", "surplus"],
)
def test_weights_that_are_not_the_models_are_refused_with_the_remedy(source, change, said):
    file = f"{source.path}/{FILE}"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"^Asker: transformer of pretrained='.*' {said}.*hf download .*`subfolder`"):
        load(source)


def test_weights_without_an_effect_may_be_missing(source):
    weights = load_file(f"{source.path}/{FILE}")
    del weights["proj_out.bias"]
    save_file(weights, f"{source.path}/{FILE}", {"format": "pt"})
    assert load(source, unused=("proj_out",)).proj_out.bias.shape == (4,)
    assert load(source, part=lambda model: model.patch_embed).proj.weight.requires_grad is False


def test_files_that_cannot_be_read_are_named_with_the_argument_and_the_remedy(source, tmp_path):
    with pytest.raises(ValueError, match=r"^Asker: cannot load model='nowhere' \(.*\); put it there$"):
        load("nowhere", argument="model", remedy="put it there")
    with pytest.raises(ValueError, match=r"^Asker: cannot load unet of pretrained=.*check `subfolder`$"):
        load(PretrainedWeights(str(tmp_path), "unet"))
    config = tmp_path / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 0}))
    with pytest.raises(ValueError, match=r"^Asker: "):
        load(source)


def test_a_source_is_its_path_or_names_its_subfolder():
    assert PretrainedWeights.of("folder") == PretrainedWeights("folder")
    assert str(PretrainedWeights("folder")) == "folder"
    assert str(PretrainedWeights.of(PretrainedWeights("folder", "unet"))) == "folder (subfolder unet)"


def test_a_path_below_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PretrainedWeights("~/weights").path == str(tmp_path / "weights")
    assert PretrainedWeights("owner/~name").path == "owner/~name"
