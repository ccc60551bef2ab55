from __future__ import annotations

import pytest
import torch

from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.sana import SanaFlowMap
from emf_lightning.networks.two_time.rules import AnchoredInterval, SummedInterval
from tests import tiny_checkpoints

SIZE = {"latent_channels": 4, "latent_size": 4, "context_width": 16}


def inputs(batch: int = 3):
    torch.manual_seed(1)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    return torch.randn(batch, 4, 4, 4), torch.rand(batch), torch.randn(batch, 5, 16), mask


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    path = tmp_path_factory.mktemp("sana")
    return path, tiny_checkpoints.sana(path)


def emf(folder, stock):
    """A released EMF checkpoint, and its two time embeddings."""
    torch.manual_seed(5)
    embeds = tiny_checkpoints.emf_time_embeds(16)
    for module in embeds.values():
        torch.nn.init.normal_(module.linear.weight, std=0.3)
    tiny_checkpoints.blip3o_checkpoint(folder, *stock, embeds)
    return embeds


def test_the_sana_of_a_blip3o_checkpoint_is_the_stock_network_bit_for_bit_where_r_equals_t(tmp_path, stock):
    tiny_checkpoints.blip3o_checkpoint(tmp_path / "blip3o", *stock)
    net = SanaFlowMap(pretrained=str(tmp_path / "blip3o"), **SIZE).eval()
    z, t, context, mask = inputs()
    with torch.no_grad():
        expected = stock[1](z, context, t * 1000.0, encoder_attention_mask=mask, return_dict=False)[0]
        assert torch.equal(net(z, t, t, context, mask), expected)
        assert not torch.allclose(net(z, t / 2, t, context, mask), expected, atol=1e-4)


def test_an_emf_checkpoint_computes_what_its_release_computes(tmp_path, stock, monkeypatch):
    """Both modulations summed, of raw t and raw t - r, for the blocks and for the output norm."""
    embeds = emf(tmp_path / "emf", stock)
    net = SanaFlowMap(pretrained=str(tmp_path / "emf"), interval=SummedInterval(), time_scale=1, **SIZE).eval()
    z, t, context, mask = inputs()
    r = t / 3
    reference = tiny_checkpoints.sana(tmp_path / "again")

    def summed(timestep, batch_size=None, hidden_dtype=None):
        of_t = embeds["time_embed_t"](t, hidden_dtype=hidden_dtype)
        of_r = embeds["time_embed_r"](t - r, hidden_dtype=hidden_dtype)
        return of_t[0] + of_r[0], of_t[1] + of_r[1]

    monkeypatch.setattr(reference.time_embed, "forward", summed)
    with torch.no_grad():
        expected = reference(z, context, t, encoder_attention_mask=mask, return_dict=False)[0]
        assert torch.allclose(net(z, r, t, context, mask), expected, atol=1e-6)


def test_every_tensor_of_an_emf_checkpoint_has_a_place_but_the_embedding_it_does_not_read(tmp_path, stock):
    embeds = emf(tmp_path / "emf", stock)
    net = SanaFlowMap(pretrained=str(tmp_path / "emf"), interval=SummedInterval(), time_scale=1, **SIZE)
    ours = net.transformer.state_dict()
    for name, tensor in stock[1].state_dict().items():
        if not name.startswith("time_embed."):
            assert torch.equal(ours[name], tensor)
    for part, place in (("time_embed_t", "time_embed"), ("time_embed_r", "time_embed.interval")):
        for name, tensor in embeds[part].state_dict().items():
            assert torch.equal(ours[f"{place}.{name}"], tensor)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"interval": AnchoredInterval(), "time_scale": 1}, "with interval 'SummedInterval"),
        ({"interval": SummedInterval(), "time_scale": 1000}, "with time_scale 1"),
        (
            {"interval": SummedInterval(), "time_scale": 1000, "finetuning": Finetuning(refit=True)},
            "knows intervals at time_scale 1,",
        ),
    ],
)
def test_an_emf_checkpoint_read_in_another_way_is_refused(tmp_path, stock, settings, named):
    emf(tmp_path / "emf", stock)
    with pytest.raises(ValueError, match=named):
        SanaFlowMap(pretrained=str(tmp_path / "emf"), **settings, **SIZE)


def test_its_size_is_counted_where_the_diffusion_folder_is_the_authors_own(tmp_path, stock):
    """The published configuration names a path of another machine; SANA-1.5's widths are then taken for granted."""
    tiny_checkpoints.blip3o_checkpoint(tmp_path / "blip3o", tmp_path / "elsewhere", stock[1])
    with pytest.raises(ValueError, match="not those of a SANA transformer with this configuration"):
        SanaFlowMap(pretrained=str(tmp_path / "blip3o"), **SIZE)


@pytest.mark.parametrize(("part", "said"), [("time_embed_t", "missing"), ("time_embed_x", "surplus")])
def test_a_checkpoint_with_other_parts_is_refused(tmp_path, stock, part, said):
    parts = tiny_checkpoints.emf_time_embeds(16)
    parts[part] = torch.nn.Linear(16, 16) if said == "missing" else tiny_checkpoints.emf_time_embeds(16)["time_embed_t"]
    tiny_checkpoints.blip3o_checkpoint(tmp_path / "emf", *stock, parts)
    with pytest.raises(ValueError, match=rf"not those of a SANA transformer .*{said} \['time_embed"):
        SanaFlowMap(pretrained=str(tmp_path / "emf"), interval=SummedInterval(), time_scale=1, **SIZE)


def test_a_damaged_file_is_named(tmp_path, stock):
    tiny_checkpoints.blip3o_checkpoint(tmp_path / "blip3o", *stock)
    file = tmp_path / "blip3o/model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is damaged"):
        SanaFlowMap(pretrained=str(tmp_path / "blip3o"), **SIZE)


def test_a_checkpoint_without_a_sana_says_so(tmp_path, stock):
    tiny_checkpoints.blip3o_checkpoint(tmp_path / "blip3o", *stock)
    for file in (tmp_path / "blip3o").glob("model*"):
        file.unlink()
    tiny_checkpoints.save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "blip3o/model.safetensors")
    with pytest.raises(ValueError, match="without a SANA"):
        SanaFlowMap(pretrained=str(tmp_path / "blip3o"), **SIZE)
