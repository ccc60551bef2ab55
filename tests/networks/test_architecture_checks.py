"""Sizes that make no network are refused in one sentence, before a library fails on them."""

from __future__ import annotations

import pytest

from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.mmdit import MMDiTArchitecture, MMDiTFlowMap
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.networks.unet import TextUNetFlowMap, UNetArchitecture, UNetFlowMap

SMALL_MMDIT = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "pooled_projection_dim": 16}


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"num_attention_heads": 4}, r"num_cross_attention_heads x .* attention_head_dim = 128, got 3 x 64"),
        ({"cross_attention_head_dim": 32}, r"attention_head_dim = 192, got 3 x 32"),
        (
            {"num_attention_heads": 1, "attention_head_dim": 6, "num_cross_attention_heads": 1},
            "multiple of 4 .* got 1 x 6 = 6",
        ),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"attention_head_dim": -32}, "attention_head_dim must be at least 1, got -32"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"interpolation_scale": 0}, "interpolation_scale must be at least 1, got 0"),
        ({"mlp_ratio": 0}, "mlp_ratio must be positive, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1\.0"),
    ],
)
def test_impossible_sana_sizes_are_refused(size, said):
    with pytest.raises(ValueError, match=f"^SanaArchitecture: .*{said}"):
        SanaArchitecture(**size)


def test_a_width_without_sine_cosine_positions_need_not_be_a_multiple_of_4():
    size = {"num_attention_heads": 1, "attention_head_dim": 6, "num_cross_attention_heads": 1}
    assert SanaArchitecture(**size, cross_attention_head_dim=6, interpolation_scale=None).attention_head_dim == 6


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_attention_heads": 3, "attention_head_dim": 5}, "multiple of 4 .* got 3 x 5 = 15"),
        ({"patch_size": -1}, "patch_size must be at least 1, got -1"),
        ({"pooled_projection_dim": 0}, "pooled_projection_dim must be at least 1, got 0"),
    ],
)
def test_impossible_mmdit_sizes_are_refused(size, said):
    with pytest.raises(ValueError, match=f"^MMDiTArchitecture: .*{said}"):
        MMDiTArchitecture(**size)


@pytest.mark.parametrize(
    ("size", "data", "said"),
    [
        ({}, {"latent_size": 9}, "latents of side 9 do not divide into patches of 2"),
        (
            {"pos_embed_max_size": 2},
            {},
            "latents of side 8 have more patches of 2 along a side than pos_embed_max_size=2",
        ),
        ({}, {"context_width": 8}, "pooled_projection_dim=16 must be at most the text features' width 8"),
    ],
)
def test_an_mmdit_that_does_not_fit_the_data_is_refused(size, data, said):
    data = {"latent_channels": 4, "latent_size": 8, "context_width": 16} | data
    with pytest.raises(ValueError, match=f"^MMDiTFlowMap: {said}"):
        MMDiTFlowMap(MMDiTArchitecture(**SMALL_MMDIT | size), **data)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"channels": [], "attention": []}, "channels is empty"),
        ({"channels": [8, 18]}, r"multiples of groups=4, got \[18\]"),
        ({"channels": [8, -16]}, r"multiples of groups=4, got \[-16\]"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"head_channels": 12}, r"multiples of head_channels=12, got \[16, 16\]"),
        ({"dropout": -0.1}, "dropout must lie in"),
    ],
)
def test_impossible_unet_sizes_are_refused(size, said):
    with pytest.raises(ValueError, match=f"^UNetArchitecture: .*{said}"):
        UNetArchitecture(**{"channels": [8, 16], "attention": [False, True], "groups": 4} | size)


def test_unets_that_do_not_fit_the_data_or_their_heads_are_refused():
    size = UNetArchitecture([8, 16, 16], [False, True, False], layers=1, groups=4, heads=5)
    with pytest.raises(ValueError, match="UNetFlowMap: latents of side 10 do not halve 2 times"):
        UNetFlowMap(size, latent_size=10)
    with pytest.raises(ValueError, match=r"multiples of heads=5, got \[16, 16\]"):
        TextUNetFlowMap(size)


def test_impossible_settings_of_a_start_are_refused():
    with pytest.raises(ValueError, match="not both"):
        SanaFlowMap(SanaArchitecture(), pretrained="somewhere")
    with pytest.raises(ValueError, match="attention_backend must be math or null, got 'flash'"):
        SanaFlowMap(attention_backend="flash")
    with pytest.raises(ValueError, match="trainable='nothing' is the beginning of no parameter's name"):
        SanaFlowMap(SanaArchitecture(num_layers=1), finetuning=Finetuning(trainable=["nothing"]))


def test_networks_say_whether_they_take_intervals_and_guidance():
    sana = SanaFlowMap(SanaArchitecture(num_layers=1))
    assert (sana.takes_interval, sana.takes_guidance) == (True, False)
    assert SanaFlowMap(SanaArchitecture(num_layers=1), guidance_conditioning=True).takes_guidance
    assert not UNetFlowMap.takes_interval and not TextUNetFlowMap.takes_interval and not MMDiTFlowMap.takes_interval
