from __future__ import annotations

import pytest
import torch
from open_clip import create_model
from open_clip.pretrained import _PRETRAINED
from torch import nn

from emf_lightning.evaluation.clip_hps.clip_model import load_clip
from tests.evaluation.tiny_clip import save_tiny_clip

IMAGE = torch.linspace(-2, 2, 3 * 32 * 32).view(1, 3, 32, 32)


def described(model) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_image(IMAGE)


class Released(nn.Module):
    """A network with the three numbers that OpenAI's files hold beside the weights, at their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, part in model.named_children():
            self.add_module(name, part)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            self.register_parameter(name, getattr(model, name))
        for name, number in {"input_resolution": 32, "context_length": 24, "vocab_size": 49408}.items():
            self.register_buffer(name, torch.tensor(number))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_own_file_is_read_with_its_activation(tmp_path):
    plain = save_tiny_clip(tmp_path)
    right = create_model("emf-tiny-clip", plain, force_quick_gelu=True).eval()
    wrong = create_model("emf-tiny-clip", plain).eval()
    assert (described(right) - described(wrong)).abs().max() > 1e-3
    torch.jit.trace(Released(right), IMAGE, check_trace=False).save(str(tmp_path / "ViT.pt"))
    clip = load_clip("ClipColours", "emf-tiny-clip", str(tmp_path / "ViT.pt"))

    torch.testing.assert_close(described(clip.model), described(right))
    assert (clip.settings["pretrained"], clip.settings["quick_gelu"]) == ("ViT.pt", True)


def test_a_path_gets_the_activation_that_is_asked_for_and_settings_tell(tmp_path):
    weights = save_tiny_clip(tmp_path)
    plain, quick = (load_clip("ClipScore", "emf-tiny-clip", weights, q) for q in (False, True))

    assert (plain.settings["quick_gelu"], quick.settings["quick_gelu"]) == (False, True)
    assert plain.settings["weights"] == quick.settings["weights"]
    assert (described(plain.model) - described(quick.model)).abs().max() > 1e-3


def test_a_tag_of_openais_weights_means_quick_gelu_whatever_the_name(tmp_path, monkeypatch):
    save_tiny_clip(tmp_path)
    monkeypatch.setitem(_PRETRAINED, "emf-tiny-clip", {"openai": {"quick_gelu": True}})
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: str(tmp_path / "emf-tiny-clip.pt"))

    assert load_clip("ClipScore", "emf-tiny-clip", "openai").settings["quick_gelu"]


def test_other_weights_have_another_digest(tmp_path):
    weights = save_tiny_clip(tmp_path)
    state = torch.load(weights)
    state["logit_scale"] += 1
    torch.save(state, tmp_path / "other.pt")
    digests = {
        load_clip("ClipScore", "emf-tiny-clip", w).settings["weights"] for w in (weights, f"{tmp_path}/other.pt")
    }

    assert len(digests) == 2
