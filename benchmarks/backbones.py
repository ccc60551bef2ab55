"""Measures each backbone with two times: size, the parent at r = t, cost and accuracy of du/dt, compilation, exports.

Writes the table of docs/results/backbones.md, on networks of the real classes with a few million weights.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.derivative import SHARES, least, table
from benchmarks.operations import count_operations, peak_bytes
from emf_lightning.flow.derivative.float64 import KeepFloat64
from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.times import Times
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.flow.weighting import AdaptiveWeighting
from emf_lightning.networks.auraflow import AuraFlowArchitecture, AuraFlowFlowMap
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.flux import FluxArchitecture, FluxFlowMap
from emf_lightning.networks.lumina2 import Lumina2Architecture, Lumina2FlowMap
from emf_lightning.networks.mmdit import MMDiTArchitecture, MMDiTFlowMap
from emf_lightning.networks.pixart import PixArtArchitecture, PixArtFlowMap
from emf_lightning.networks.qwen_image import QwenImageArchitecture, QwenImageFlowMap
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.networks.two_time.rules import AnchoredInterval
from emf_lightning.networks.two_time.two_time_embedding import without_interval
from emf_lightning.networks.unet import TextUNetFlowMap, UNetArchitecture, UNetFlowMap
from emf_lightning.pipeline import PipelinePart
from emf_lightning.pretrained.loading import PretrainedWeights

DOCUMENT = Path(__file__).parents[1] / "docs" / "results" / "backbones.md"
MARKS = ("<!-- measured by benchmarks/backbones.py -->", "<!-- end of what was measured -->")
ROWS, SIDE, TOKENS, WIDTH = 4, 16, 16, 128
"""Samples of a batch, side of the latents, tokens of a caption and their channels."""


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


class Measurement:
    """A network with random weights, none of which is a copy of another or zero, and a batch for it."""

    def __init__(self, backbone: Backbone) -> None:
        torch.manual_seed(0)
        self.backbone = backbone
        shape = {"latent_channels": backbone.channels, "latent_size": SIDE, "context_width": WIDTH}
        self.arguments: dict[str, Any] = shape | backbone.options
        self.net = self.build()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        self.z, self.v = torch.randn(2, ROWS, backbone.channels, SIDE, SIDE).unbind()
        self.t = 0.2 + 0.7 * torch.rand(ROWS)
        self.context = torch.randn(ROWS, TOKENS, WIDTH), torch.ones(ROWS, TOKENS, dtype=torch.bool)

    def build(self, **settings: Any) -> FlowMapNetwork:
        """A network of this size."""
        architecture = self.backbone.architecture
        return self.backbone.kind(architecture, interval=AnchoredInterval(), **self.arguments, **settings)

    def parameters(self) -> str:
        """Those of the published size with one time, in millions."""
        source = {} if self.backbone.weights is None else {"pretrained": self.backbone.weights}
        if self.backbone.kind is SanaFlowMap:
            source |= {"latent_channels": 32, "latent_size": 32, "context_width": 2304}
        with torch.device("meta"):
            net = self.backbone.kind(**source)
        count = sum(p.numel() for name, p in net.named_parameters() if ".interval." not in name)
        return f"{count / 1e6:,.1f} M"

    def call(self, net: FlowMapNetwork, r: Tensor) -> Tensor:
        """u at ``r`` and t."""
        with torch.no_grad():
            return net(self.z, r, self.t, *self.context)

    def parent(self) -> str:
        """Whether u at r = t is the output of the backbone that knows one time."""
        with without_interval(self.net) as known:
            expected = self.call(self.net, self.t)
        differs = not torch.equal(self.call(self.net, 0.4 * self.t), expected)
        return _yes(known and differs and torch.equal(self.call(self.net, self.t), expected))

    def step(self, net: FlowMapNetwork, share: float) -> None:
        """One forward and backward pass of MeanFlow, of flow matching where ``share`` is 0."""
        n = round(share * ROWS)
        times = Times(torch.cat([0.4 * self.t[:n], self.t[n:]]), self.t, n)
        objective = MeanFlow() if n else FlowMatching()
        u = AverageVelocity(net, self.context)
        torch.autograd.backward(objective.terms(u, self.z, self.v, times, AdaptiveWeighting(), 0.0).loss)
        torch.clear_autocast_cache()

    def operations(self) -> list[str]:
        """Those of MeanFlow's steps over the least, for each share of r < t."""
        flow = count_operations(lambda: self.step(self.net, 0))
        ratios = (count_operations(lambda s=share: self.step(self.net, s)) / flow / least(share) for share in SHARES)  # type: ignore[misc]
        return [f"{ratio:.3f}" for ratio in ratios]

    def errors(self) -> list[str]:
        """Relative errors of du/dt against float64: fp32, bf16 autocast, bf16 weights."""
        inputs = self.z, 0.4 * self.t, self.t, self.v
        context, mask = self.context
        with KeepFloat64():
            u = AverageVelocity(copy.deepcopy(self.net).double(), (context.double(), mask))
            exact = ForwardMode().jvp(u, *(each.double() for each in inputs))
        coarse = copy.deepcopy(self.net).bfloat16()
        derivatives = (ForwardMode("fp32"), self.net), (ForwardMode("bf16"), self.net), (ForwardMode(), coarse)
        found = [kind.jvp(AverageVelocity(net, self.context), *inputs).double() for kind, net in derivatives]
        return [f"{float((dudt - exact).norm() / exact.norm()):.0e}" for dudt in found]

    def memory(self) -> str:
        """Peak memory of MeanFlow's step, half of whose rows have r < t, over that of flow matching's."""
        return f"{self.peak(self.net, 0.5) / self.peak(self.net, 0):.2f}"

    def peak(self, net: FlowMapNetwork, share: float) -> int:
        """Bytes at the peak of a step that has run before."""
        self.step(net, share)
        return peak_bytes(lambda: self.step(net, share), torch.device("cpu"))

    def checkpointing(self) -> str:
        """Relative difference of the gradient with checkpointing, and its peak of memory."""
        other = self.build(gradient_checkpointing=True)
        error = self.difference(other)
        return f"{error:.0e}, {self.peak(other, 0.5) / self.peak(self.net, 0.5):.2f} of the memory"

    def compiled(self) -> str:
        """Relative difference of the gradient with compiled blocks; torch's error where it cannot compile them."""
        try:
            return f"{self.difference(self.build(compile=True)):.0e}"
        except Exception as error:  # its type depends on what the blocks do
            return type(error).__name__

    def difference(self, other: FlowMapNetwork) -> float:
        """Relative difference of the gradient of ``other``, with these weights."""
        other.load_state_dict(self.net.state_dict())
        ours, theirs = self.gradient(self.net), self.gradient(other)
        return float((ours - theirs).norm() / ours.norm())

    def gradient(self, net: FlowMapNetwork) -> Tensor:
        """That of a step, half of whose rows have r < t."""
        net.zero_grad()
        self.step(net, 0.5)
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    def graph(self) -> str:
        """Whether torch.export's graph of the network computes the same, and for other numbers of samples."""
        inputs = self.z, 0.4 * self.t, self.t, *self.context
        batch = torch.export.Dim("batch", min=2, max=32)
        for shapes, found in (([{0: batch}] * len(inputs), ""), (None, ", of one batch size")):
            try:
                with torch.no_grad():
                    graph = torch.export.export(self.net.eval(), inputs, dynamic_shapes=shapes).module()
            except Exception:  # its type depends on what the model does
                continue
            return _yes(torch.equal(graph(*inputs), self.call(self.net, inputs[1]))) + found
        return "no"

    def export(self) -> str:
        """Whether the exported network, read back, is the same to the bit."""
        kind: Any = self.backbone.kind
        interval = {"class_path": f"{AnchoredInterval.__module__}.AnchoredInterval"}
        arguments = self.arguments | {"interval": interval}
        spec = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": arguments}
        with tempfile.TemporaryDirectory() as folder:
            PipelinePart(self.net, spec).save_pretrained(folder)
            again = PipelinePart.from_pretrained(folder).part
        r = 0.4 * self.t
        return _yes(torch.equal(self.call(again, r), self.call(self.net.eval(), r)))

    def row(self) -> list[str]:
        """The cells."""
        cells = [self.parameters(), self.backbone.published, self.parent(), *self.operations(), self.memory()]
        return [*cells, *self.errors(), self.checkpointing(), self.compiled(), self.export(), self.graph()]


HEAD = (
    *("backbone", "parameters", "stated", "the parent at r = t"),
    *(f"operations / least, p = {share}" for share in SHARES),
    *("memory / flow matching", "error of du/dt, fp32", "bf16 autocast", "bf16 weights"),
    *("checkpointing", "compiled", "export", "torch.export"),
)


def _yes(holds: bool) -> str:
    return "bit for bit" if holds else "NO"


def main() -> None:
    """Measures all backbones and writes them into the document."""
    torch.set_num_threads(1)
    rows = []
    for name, backbone in BACKBONES.items():
        rows.append([name, *Measurement(backbone).row()])
        print(" | ".join(rows[-1]), flush=True)
    before, rest = DOCUMENT.read_text().split(MARKS[0])
    lines = "\n".join(table(HEAD, rows))
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n\n{lines}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
