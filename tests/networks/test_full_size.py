"""Full-size networks on the meta device: every name, shape and count as published."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel

from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.sana import SanaFlowMap
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


def count(net: SanaFlowMap, *, trainable: bool = False) -> int:
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


def test_blip3o_next_plans_with_the_size_of_its_sana():
    assert count(full_size("BLIP3o/BLIP3o-NEXT-SFT-3B", None)) == count(full_size(SANA.format("1.6B")))
