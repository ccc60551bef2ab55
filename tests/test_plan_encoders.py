"""`emf plan` builds each text encoder in its size alone: no weights, no hub."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import BertConfig, BertModel

import emf_lightning.text as text
from emf_lightning.cli import main
from emf_lightning.cli.parsing import import_classes
from emf_lightning.cli.sizes import EncoderSize, encoder_size, sized
from emf_lightning.text.base import TextEncoder

PIPELINE = "stabilityai/stable-diffusion-3.5-medium"
SD15 = "XCLiu/2_rectified_flow_from_sd_1_5"

SIZES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "words.WordEncoder": ({"width": 64, "length": 5}, (0, 64, 5)),
    "no_text.NoText": ({}, (0, 8, 1)),
    "degraded.DegradedEncoder": (
        {"encoder": {"class_path": "emf_lightning.text.words.WordEncoder", "init_args": {"width": 32}}},
        (0, 32, 12),
    ),
    "sana_gemma.SanaGemma": ({"length": 77}, (2_614_341_888, 2304, 77)),
    "pixart_lumina.PixArtTextEncoder": ({}, (4_762_310_656, 4096, 300)),
    "pixart_lumina.Lumina2TextEncoder": ({"length": 64}, (2_614_341_888, 2304, 64)),
    "stable_diffusion.StableDiffusionTextEncoder": ({"pretrained": SD15}, (123_060_480, 768, 77)),
    "stable_diffusion.SD3TextEncoder": ({"pretrained": PIPELINE, "t5_length": 100}, (5_580_620_800, 4096, 178)),
    "stable_diffusion.FluxTextEncoder": (
        {"pretrained": "Freepik/flux.1-lite-8B", "t5_length": 64},
        (4_885_371_136, 4096, 65),
    ),
    "blip3o_next.BLIP3oNext": (
        {"pretrained": "BLIP3o/BLIP3o-NEXT-SFT-3B", "token_pool": 9},
        (2_813_004_960, 2304, 10),
    ),
    "open_clip.OpenClipTextEncoder": (
        {"model": "ViT-B-32", "pretrained": "openai", "length": 20},
        (63_428_096, 512, 20),
    ),
    "pretrained.PretrainedTextEncoder": ({"model": "google/gemma-2-2b-it", "length": 9}, (2_614_341_888, 2304, 9)),
}
"""Arguments, and (parameters, width, length)."""


def size_of(name: str, arguments: dict[str, Any]) -> EncoderSize:
    parser = ArgumentParser()
    parser.add_argument("--text", type=TextEncoder)
    spec = {"class_path": name, "init_args": arguments}
    return encoder_size(sized(parser.parse_object({"text": spec}).text, TextEncoder))


def test_every_encoder_of_the_package_is_here():
    import_classes("text")
    below = [TextEncoder]
    for kind in below:
        below += kind.__subclasses__()
    ours = {f"{k.__module__}.{k.__name__}" for k in below if k.__module__.startswith(text.__name__)}
    abstract = {f"{k.__module__}.{k.__name__}" for k in below if inspect.isabstract(k)}
    assert ours - abstract == {f"{text.__name__}.{name}" for name in SIZES}


@pytest.mark.parametrize("name", SIZES)
def test_an_encoder_has_the_size_of_its_settings(name):
    arguments, expected = SIZES[name]
    size = size_of(f"emf_lightning.text.{name}", arguments)

    assert (size.parameters, size.width, size.length) == expected
    assert (sum(size.flops) > size.parameters) == (size.parameters > 0)


def test_its_dtype_counts():
    spec = {"pretrained": SD15, "dtype": "float16"}
    assert size_of("emf_lightning.text.stable_diffusion.StableDiffusionTextEncoder", spec).bytes == 2 * 123_060_480


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BertConfig:
    """The configuration of a small model in ``bert``, without weights."""
    monkeypatch.chdir(tmp_path)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    config.save_pretrained("bert")
    return config


def test_operations_of_a_local_model_are_those_of_its_matrices(small):
    size = size_of("emf_lightning.text.pretrained.PretrainedTextEncoder", {"model": "bert", "length": 6})

    blocks = 3 * (4 * 16 * 16 + 2 * 16 * 24)
    attention = 3 * 2 * 6 * 16  # each token with 6 others: scores and sums
    assert size.parameters == sum(p.numel() for p in BertModel(small).parameters())
    assert size.flops[0] == pytest.approx(2 * 6 * (blocks + attention), rel=0.1)


OWN = """
import torch
from transformers import AutoModel
from emf_lightning.text.base import TextEncoder, TextFeatures


class Own(TextEncoder):
    def __init__(self, keep: int = 4, numbers: bool = False) -> None:
        super().__init__()
        self.tower = AutoModel.from_pretrained("bert")
        self.width, self.length = self.tower.config.hidden_size, keep
        if numbers:  # which the meta device has not
            self.length = int(torch.ones(keep).sum().item()) + 1
        self.freeze()

    @property
    def fingerprint(self) -> str:
        return "own"

    def encode(self, captions):
        raise NotImplementedError
"""

EXPERIMENT = """
base: shapes/flow_matching
data:
  text: {class_path: own_text.Own, init_args: {keep: 7}}
"""


def test_an_own_encoder_is_planned_without_its_weights(small, capsys):
    Path("own_text.py").write_text(OWN)
    Path("own.yaml").write_text(EXPERIMENT)
    lines = {}
    for numbers in ("false", "true"):
        main(["plan", "own.yaml", "--trust_remote_code", "--data.text.init_args.numbers", numbers])
        lines[numbers] = capsys.readouterr().out

    count = sum(p.numel() for p in BertModel(small).parameters())
    assert all(f"{count:,}" in out for out in lines.values())
    each = {numbers: out.partition("data.cache")[2].split()[2] for numbers, out in lines.items()}
    assert float(each["false"]) == pytest.approx((7 * 16 * 4 + 21) / 1e6, rel=0.01)  # fp32, mask and header
    assert float(each["true"]) == pytest.approx((8 * 16 * 4 + 21) / 1e6, rel=0.01)
    assert "encoding a pair again" in lines["false"]
    assert torch.get_default_device().type == "cpu"
