"""A network and its sampling in two steps by torch.export: plain operations of torch, for batches of any size."""

from __future__ import annotations

import io

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from emf_lightning.flow.sampling import sample
from emf_lightning.networks.prediction import PredictNoise, PredictVelocity
from tests.adapters import NAMES, built, inputs
from tests.networks.test_two_time import stir

OF_ONE_BATCH = NAMES if Version(torch.__version__) < Version("2.15") else ("Qwen-Image",)
"""Those that fix the number of samples: Qwen-Image's model takes a Python list with an entry for each; torch 2.10 fixes
it for all."""

QUICK = ("PixArt",)
"""The others take as long each, up to ten seconds."""


class TwoSteps(nn.Module):
    """Data from noise, as docs/how_to/export.md has it."""

    def __init__(self, net: nn.Module, guidance_scale: float = 1.0) -> None:
        super().__init__()
        self.net, self.scale = net, guidance_scale
        self.register_buffer("null", torch.randn(1, 7, 16))

    def forward(self, noise: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        null = self.null, torch.ones_like(mask[:1])
        return sample(self.net, noise, (context, mask), steps=2, null_context=null, guidance_scale=self.scale)


def read_back(program: ExportedProgram) -> nn.Module:
    """The program from its file; it calls nothing of this package or of diffusers."""
    assert not any(name in program.graph_module.code for name in ("emf_lightning", "diffusers"))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES if n != "Lumina2"]
)
def test_exported_sampling_is_the_networks_bit_for_bit_for_other_captions_and_batches(name):
    model = TwoSteps(stir(built(name)).eval(), guidance_scale=2.0 if name == "SD3" else 1.0)
    z, _, _, context, mask = inputs(name)
    mask[0, 4:] = False
    batch = None if name in OF_ONE_BATCH else Dim("batch", min=2, max=32)
    with torch.no_grad():  # a graph that switches gradients off by itself cannot be read back from its file
        program = read_back(export(model, (z, context, mask), dynamic_shapes=[{0: batch}] * 3 if batch else None))
    rows = [3] if name in OF_ONE_BATCH else [3, 2, 5]
    for n in rows:
        torch.manual_seed(n)
        others = torch.randn(n, *z.shape[1:]), torch.randn(n, 7, 16), torch.rand(n, 7) < 0.7
        others[2][:, 0] = True
        assert torch.equal(program(*others), model(*others)), n


@pytest.mark.parametrize("prediction", [PredictVelocity(), PredictNoise(steps=50)])
def test_an_exported_network_is_the_same_bit_for_bit_at_other_times(prediction):
    net = stir(built("PixArt")).eval().requires_grad_(False)
    net.prediction = prediction
    z, r, t, *text = inputs("PixArt")
    program = read_back(export(net, (z, r, t, *text)))
    for times in ((r, t), (t, t), (0 * t, 1 + 0 * t)):
        assert torch.equal(program(z, *times, *text), net(z, *times, *text))


def test_what_reads_lengths_off_the_mask_does_not_export():
    """Named in the documentation: Lumina-Image 2.0 cuts its sequences to their lengths."""
    z, _, t, context, mask = inputs("Lumina2")
    with pytest.raises(Exception, match=r"SymInt|data-dependent"):
        export(built("Lumina2").eval(), (z, t, t, context, mask))
