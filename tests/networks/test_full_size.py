"""Full-size networks on the meta device: every name, shape and count as published."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel

from emf_lightning.networks.auraflow import AuraFlowArchitecture, AuraFlowFlowMap
from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.flux import FluxArchitecture, FluxFlowMap
from emf_lightning.networks.lumina2 import Lumina2Architecture, Lumina2FlowMap
from emf_lightning.networks.mmdit import MMDiTArchitecture, MMDiTFlowMap
from emf_lightning.networks.pixart import PixArtFlowMap
from emf_lightning.networks.qwen_image import QwenImageArchitecture, QwenImageFlowMap
from emf_lightning.networks.sana import SanaFlowMap
from emf_lightning.networks.two_time.rules import AnchoredInterval
from emf_lightning.pretrained.configs import CONFIGS
from emf_lightning.pretrained.loading import PretrainedWeights

SANA = "Efficient-Large-Model/SANA1.5_{}_1024px_diffusers"
EMF = ["transformer_blocks", "time_embed", "scale_shift_table"]


def full_size(pretrained: str, subfolder: str | None = "transformer", **settings) -> SanaFlowMap:
    with torch.device("meta"):
        return SanaFlowMap(
            pretrained=PretrainedWeights(pretrained, subfolder),
            latent_channels=32,
            latent_size=32,
            context_width=2304,
            **settings,
        )


def count(net: torch.nn.Module, *, trainable: bool = False) -> int:
    return sum(p.numel() for p in net.parameters() if p.requires_grad or not trainable)


@pytest.mark.parametrize(
    ("size", "published", "interval"),
    [
        # 1.6 B and 4.8 B in SANA-1.5's paper (arXiv 2501.18427); exactly: diffusers' class with the configuration of
        # its conversion script, query-key norms included
        ("1.6B", 1_604_641_952, 35_714_560),
        ("4.8B", 4_721_825_952, 35_714_560),
    ],
)
def test_every_tensor_is_a_published_one_or_the_intervals(size, published, interval):
    net = full_size(SANA.format(size))
    with torch.device("meta"):
        stock = SanaTransformer2DModel(**CONFIGS[SANA.format(size) + "/transformer"])
    theirs = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    ours = {name: tensor.shape for name, tensor in net.transformer.state_dict().items()}
    assert {name: ours[name] for name in theirs} == theirs
    new = {name.removeprefix("time_embed.interval."): ours[name] for name in ours.keys() - theirs.keys()}
    embedding = {n.removeprefix("time_embed."): s for n, s in theirs.items() if n.startswith("time_embed.")}
    assert new == embedding, "what is new is a second time embedding"
    assert sum(p.numel() for p in stock.parameters()) == published
    assert count(net) == published + interval


def test_emf_trains_all_but_the_ends_of_the_network():
    """arXiv 2604.18168's release freezes patch_embed, caption_projection, caption_norm and proj_out."""
    net = full_size(SANA.format("1.6B"), finetuning=Finetuning(trainable=EMF))
    frozen = {name.partition(".")[0] for name, p in net.transformer.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed", "caption_projection", "caption_norm", "proj_out"}
    assert count(net) - count(net, trainable=True) == (
        (32 * 2240 + 2240) + (2304 * 2240 + 2240) + (2240 * 2240 + 2240) + 2240 + (2240 * 32 + 32)
    )


@pytest.mark.parametrize(
    ("kind", "name", "size", "published"),
    [
        # in millions; those of the papers and model cards are 2 B, 2.5 B (with its table of positions), 8.1 B, 12 B,
        # 12 B, 8 B, .6 B, 2.6 B, 20 B and 6.8 B
        (MMDiTFlowMap, "stabilityai/stable-diffusion-3-medium-diffusers", MMDiTArchitecture(), 2_028),
        (
            MMDiTFlowMap,
            "stabilityai/stable-diffusion-3.5-medium",
            MMDiTArchitecture(pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
            2_243,
        ),
        (
            MMDiTFlowMap,
            "stabilityai/stable-diffusion-3.5-large",
            MMDiTArchitecture(num_layers=38, num_attention_heads=38, qk_norm="rms_norm"),
            8_057,
        ),
        (FluxFlowMap, "black-forest-labs/FLUX.1-dev", FluxArchitecture(), 11_901),
        (FluxFlowMap, "black-forest-labs/FLUX.1-schnell", FluxArchitecture(guidance_embeds=False), 11_891),
        (FluxFlowMap, "Freepik/flux.1-lite-8B", FluxArchitecture(num_layers=8), 8_163),
        (PixArtFlowMap, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", None, 611),
        (Lumina2FlowMap, "Alpha-VLLM/Lumina-Image-2.0", Lumina2Architecture(), 2_610),
        (QwenImageFlowMap, "Qwen/Qwen-Image", QwenImageArchitecture(), 20_430),
        (AuraFlowFlowMap, "fal/AuraFlow-v0.3", AuraFlowArchitecture(), 6_859),
    ],
)
def test_other_backbones_are_of_the_published_sizes(kind, name, size, published):
    with torch.device("meta"):
        net = kind(pretrained=PretrainedWeights(name, "transformer"))
        two = kind(pretrained=PretrainedWeights(name, "transformer"), interval=AnchoredInterval())
        assert round(count(net) / 1e6) == published
        assert count(two) - count(net) == count(net.model.get_submodule(net.places.embedding))
        if size is not None:  # PixArt's published output has a variance, one from scratch has not
            assert count(kind(size)) == count(net)


def test_blip3o_next_plans_with_the_size_of_its_sana():
    assert count(full_size("BLIP3o/BLIP3o-NEXT-SFT-3B", None)) == count(full_size(SANA.format("1.6B")))
