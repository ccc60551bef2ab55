"""Measures each backbone with two times: size, the parent at r = t, cost and accuracy of du/dt, devices, exports.

Writes the table of docs/results/backbones.md, on networks of the real classes with a few million weights.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.derivative import SHARES, least, table
from benchmarks.operations import count_operations, peak_bytes
from benchmarks.tiny_backbones import BACKBONES, SIDE, WIDTH, Backbone
from benchmarks.two_processes import WAYS, cell, measure
from emf_lightning.flow.derivative.float64 import KeepFloat64
from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.path import expand_like
from emf_lightning.flow.times import Times
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.flow.weighting import AdaptiveWeighting
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.sana import SanaFlowMap
from emf_lightning.networks.two_time.rules import AnchoredInterval
from emf_lightning.networks.two_time.two_time_embedding import without_interval
from emf_lightning.pipeline import PipelinePart

DOCUMENT = Path(__file__).parents[1] / "docs" / "results" / "backbones.md"
MARKS = ("<!-- measured by benchmarks/backbones.py -->", "<!-- end of what was measured -->")
ROWS, TOKENS = 4, 16
"""Samples of a batch, and tokens of a caption."""


class Measurement:
    """A tiny network and a batch for it."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.net = backbone.build()
        self.z, self.v = torch.randn(2, ROWS, backbone.channels, SIDE, SIDE).unbind()
        self.t = 0.2 + 0.7 * torch.rand(ROWS)
        self.context = torch.randn(ROWS, TOKENS, WIDTH), torch.ones(ROWS, TOKENS, dtype=torch.bool)

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

    def times(self, share: float) -> Times:
        """Those of the batch, of which a ``share`` has r < t."""
        n = round(share * ROWS)
        return Times(torch.cat([0.4 * self.t[:n], self.t[n:]]), self.t, n)

    def step(self, net: FlowMapNetwork, share: float) -> None:
        """One forward and backward pass of MeanFlow, of flow matching where ``share`` is 0."""
        times = self.times(share)
        objective = MeanFlow() if times.n_interval else FlowMatching()
        u = AverageVelocity(net, self.context)
        torch.autograd.backward(objective.terms(u, self.z, self.v, times, AdaptiveWeighting(), 0.0).loss)
        torch.clear_autocast_cache()

    def whole_batch(self) -> str:
        """Relative difference of the gradient to that of du/dt of all rows by torch's own forward mode, in fp32."""
        times, u = self.times(0.5), AverageVelocity(self.net, self.context)

        def step() -> None:
            moving, along = (self.z, self.t), (self.v, torch.ones_like(self.t))
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                dudt = torch.func.jvp(lambda z, t: u(z, times.r, t), moving, along)[1]
            target = self.v - expand_like(times.t - times.r, self.z) * dudt
            squares = (u(self.z, times.r, times.t) - target).square().flatten(1).sum(1)
            torch.autograd.backward((squares / (squares.detach() + 1e-3)).mean())

        ours, theirs = self.gradient(self.net), self.gradient(self.net, step)
        return f"{float((ours - theirs).norm() / theirs.norm()):.0e}"

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
        other = self.backbone.build(gradient_checkpointing=True)
        error = self.difference(other)
        return f"{error:.0e}, {self.peak(other, 0.5) / self.peak(self.net, 0.5):.2f} of the memory"

    def compiled(self) -> str:
        """Relative difference of the gradient with compiled blocks; torch's error where it cannot compile them."""
        try:
            return f"{self.difference(self.backbone.build(compile=True)):.0e}"
        except Exception as error:  # its type depends on what the blocks do
            return type(error).__name__

    def difference(self, other: FlowMapNetwork) -> float:
        """Relative difference of the gradient of ``other``, with these weights."""
        other.load_state_dict(self.net.state_dict())
        ours, theirs = self.gradient(self.net), self.gradient(other)
        return float((ours - theirs).norm() / ours.norm())

    def gradient(self, net: FlowMapNetwork, step: Callable[[], None] | None = None) -> Tensor:
        """That of ``step``, by default of one half of whose rows have r < t."""
        net.zero_grad()
        (step or partial(self.step, net, 0.5))()
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
        arguments = self.backbone.arguments | {"interval": interval}
        spec = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": arguments}
        with tempfile.TemporaryDirectory() as folder:
            PipelinePart(self.net, spec).save_pretrained(folder)
            again = PipelinePart.from_pretrained(folder).part
        r = 0.4 * self.t
        return _yes(torch.equal(self.call(again, r), self.call(self.net.eval(), r)))

    def row(self, devices: list[str]) -> list[str]:
        """The cells, of which ``devices`` are those of DDP and FSDP2."""
        cells = [self.parameters(), self.backbone.published, self.parent(), *self.operations(), self.memory()]
        cells += [*self.errors(), self.whole_batch(), self.checkpointing(), *devices]
        return [*cells, self.compiled(), self.export(), self.graph()]


HEAD = (
    *("backbone", "parameters", "stated", "the parent at r = t"),
    *(f"operations / least, p = {share}" for share in SHARES),
    *("memory / flow matching", "error of du/dt, fp32", "bf16 autocast", "bf16 weights"),
    *("gradient, whole batch", "checkpointing", *WAYS, "compiled", "export", "torch.export"),
)


def _yes(holds: bool) -> str:
    return "bit for bit" if holds else "NO"


def main() -> None:
    """Measures all backbones and writes them into the document."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))  # first: its processes are forks of this one
    rows = []
    for name, backbone in BACKBONES.items():
        rows.append([name, *Measurement(backbone).row([cell(found[name], way) for way in WAYS])])
        print(" | ".join(rows[-1]), flush=True)
    before, rest = DOCUMENT.read_text().split(MARKS[0])
    lines = "\n".join(table(HEAD, rows))
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n\n{lines}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
