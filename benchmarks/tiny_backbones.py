"""Tiny networks of each backbone's own class, with two times: what the table of backbones is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from emf_lightning.networks.auraflow import AuraFlowArchitecture, AuraFlowFlowMap
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.flux import FluxArchitecture, FluxFlowMap
from emf_lightning.networks.lumina2 import Lumina2Architecture, Lumina2FlowMap
from emf_lightning.networks.mmdit import MMDiTArchitecture, MMDiTFlowMap
from emf_lightning.networks.pixart import PixArtArchitecture, PixArtFlowMap
from emf_lightning.networks.qwen_image import QwenImageArchitecture, QwenImageFlowMap
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.networks.two_time.rules import AnchoredInterval
from emf_lightning.networks.unet import TextUNetFlowMap, UNetArchitecture, UNetFlowMap
from emf_lightning.pretrained.loading import PretrainedWeights

SIDE, WIDTH = 16, 128
"""Side of the latents, and channels of a caption's tokens."""


@dataclass(frozen=True)
class Backbone:
    """A backbone in the table.

    Attributes:
        kind: its class.
        architecture: of the network that is measured.
        published: number of parameters that its authors state, and where they state it.
        weights: the published ones, whose parameters are counted; None for the class's defaults.
        channels: of the latents.
        options: further arguments of the class.
    """

    kind: Callable[..., FlowMapNetwork]
    architecture: Any
    published: str
    weights: PretrainedWeights | None = None
    channels: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the class beside the size and the rule that joins r and t."""
        return {"latent_channels": self.channels, "latent_size": SIDE, "context_width": WIDTH} | self.options

    def build(self, **settings: Any) -> FlowMapNetwork:
        """A network whose weights are random, none of which is a copy of another or zero."""
        torch.manual_seed(0)
        net = self.kind(self.architecture, interval=AnchoredInterval(), **self.arguments, **settings)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return net


def _of(name: str, subfolder: str = "transformer") -> PretrainedWeights:
    return PretrainedWeights(name, subfolder)


_SD3: dict[str, Any] = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "pos_embed_max_size": 16}
_ROPE = (8, 12, 12)
_UNET = UNetArchitecture([64, 128], [False, True], layers=1, heads=4)

BACKBONES: dict[str, Backbone] = {
    "SANA-1.5 1.6B": Backbone(
        SanaFlowMap,
        SanaArchitecture(3, 4, 32, 4, 32, patch_size=2, interpolation_scale=None, qk_norm="rms_norm_across_heads"),
        "1.6 B",
        _of("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"),
    ),
    "SD3-medium": Backbone(
        MMDiTFlowMap,
        MMDiTArchitecture(**_SD3, pooled_projection_dim=64),
        "2 B",
        _of("stabilityai/stable-diffusion-3-medium-diffusers"),
    ),
    "SD3.5-medium": Backbone(
        MMDiTFlowMap,
        MMDiTArchitecture(**_SD3, pooled_projection_dim=64, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        "2.5 B, with its table of positions",
        _of("stabilityai/stable-diffusion-3.5-medium"),
    ),
    "FLUX.1-lite": Backbone(
        FluxFlowMap,
        FluxArchitecture(2, 3, 4, 32, pooled_projection_dim=64, axes_dims_rope=_ROPE),
        "8 B",
        _of("Freepik/flux.1-lite-8B"),
        options={"guidance": 4.0},  # 4000 is a number of bf16; FLUX itself rounds 3500 to 3504 there
    ),
    "PixArt-Sigma": Backbone(
        PixArtFlowMap, PixArtArchitecture(4, 4, 32), ".6 B", _of("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
    ),
    "Lumina-Image 2.0": Backbone(
        Lumina2FlowMap,
        Lumina2Architecture(WIDTH, 3, 1, 4, 2, multiple_of=32, axes_dim_rope=_ROPE, axes_lens=(32, 16, 16)),
        "2.6 B",
        _of("Alpha-VLLM/Lumina-Image-2.0"),
    ),
    "Qwen-Image": Backbone(
        QwenImageFlowMap, QwenImageArchitecture(3, 4, 32, axes_dims_rope=_ROPE), "20 B", _of("Qwen/Qwen-Image")
    ),
    "AuraFlow 0.3": Backbone(
        AuraFlowFlowMap,
        AuraFlowArchitecture(2, 3, 4, 32, pos_embed_max_size=64),
        "6.8 B, without its table of positions",
        _of("fal/AuraFlow-v0.3"),
    ),
    "UNet of DDPM": Backbone(UNetFlowMap, _UNET, "35.7 M (arXiv 2006.11239)", None, 3),
    "UNet of Stable Diffusion 1.5": Backbone(
        TextUNetFlowMap, _UNET, "860 M", _of("XCLiu/2_rectified_flow_from_sd_1_5", "unet")
    ),
}
