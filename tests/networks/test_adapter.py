"""LoRA adapters on each backbone: what trains, the derivative, files, stock diffusers and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.networks.adapter import Adapter
from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.frozen import EMATarget, FrozenNetwork, copied
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.networks.two_time.rules import DecoupledInterval
from tests.adapters import NAMES, SANA, adapted, built, inputs, parent, same, train
from tests.networks.test_two_time import call

backbones = pytest.mark.parametrize("name", NAMES)
ADAPTERS, BESIDE = "pytorch_lora_weights.safetensors", "trained_weights.safetensors"


@backbones
def test_adapters_and_the_intervals_embedding_train_and_at_first_it_is_the_parent(tmp_path, name):
    one = parent(name, tmp_path)
    net = adapted(name, tmp_path)
    training = {each for each, weight in net.named_parameters() if weight.requires_grad}
    assert all(".lora_A." in each or ".lora_B." in each or ".interval." in each for each in training)
    for kind in (".lora_A.", ".lora_B.", ".interval."):
        assert any(kind in each for each in training)
    z, _, t, *text = inputs(name)
    torch.testing.assert_close(call(net, z, t, t, *text), call(one, z, t, t, *text), rtol=1e-5, atol=1e-6)
    net.train()
    net(z, t / 2, t, *text).square().sum().backward()
    assert {each for each, weight in net.named_parameters() if weight.grad is not None} == training


@backbones
def test_dudt_through_adapters_is_exact(tmp_path, name):
    """Forward mode against central differences in float64."""
    parent(name, tmp_path)
    net = adapted(name, tmp_path)
    train(net)
    net.double()
    z, r, t, context, mask = inputs(name)
    z, r, t, context = (each.double() for each in (z, r, t, context))
    u = AverageVelocity(net, (context, mask))
    v, h = torch.randn_like(z), 1e-4
    dudt = ForwardMode().jvp(u, z, r, t, v)
    with torch.no_grad():
        expected = (u(z + h * v, r, t + h) - u(z - h * v, r, t - h)) / (2 * h)
        for weight in net.parameters():
            weight.mul_(0) if weight.requires_grad else None
    assert ((dudt - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max() < 1e-3
    without = ForwardMode().jvp(u, z, r, t, v)
    assert ((without - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).min() > 1e-2


@backbones
def test_a_folder_holds_what_trained_alone_and_merged_the_whole_network(tmp_path, name):
    parent(name, tmp_path / "parent")
    net = adapted(name, tmp_path / "parent")
    train(net)
    net.save_pretrained(tmp_path / "adapters")
    files = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert files == {"config.json", ADAPTERS, BESIDE}
    saved = [tensor for file in (ADAPTERS, BESIDE) for tensor in load_file(tmp_path / "adapters" / file).values()]
    assert sum(t.numel() for t in saved) == sum(p.numel() for p in net.parameters() if p.requires_grad)

    again = built(name, pretrained=str(tmp_path / "adapters")).eval()
    assert same(again.state_dict(), net.state_dict())
    assert again.parent_weights == net.parent_weights and again.parametrization == net.parametrization

    expected = call(net, *inputs(name))
    again.merge_adapters()
    torch.testing.assert_close(call(again, *inputs(name)), expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in each or "base_layer" in each for each in again.state_dict())
    again.save_pretrained(tmp_path / "merged")
    whole = built(name, pretrained=str(tmp_path / "merged")).eval()
    assert same(whole.state_dict(), again.state_dict()) and not whole.parent_weights


STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "SANA": ("SanaPipeline", {"tokenizer": None, "text_encoder": None, "vae": None}),
    "SD3": ("StableDiffusion3Pipeline", {}),
    "SD3.5": ("StableDiffusion3Pipeline", {}),
    "FLUX": ("FluxPipeline", {}),
    "Lumina2": ("Lumina2Pipeline", {}),
    "Qwen-Image": ("QwenImagePipeline", {}),
    "AuraFlow": ("AuraFlowPipeline", {}),
    "text UNet": ("StableDiffusionPipeline", {"safety_checker": None, "feature_extractor": None}),
}
"""diffusers' pipelines that load adapters; PixArt's and the unconditional UNet's do not."""


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_stock_diffusers_loads_the_adapters_with_their_scale(tmp_path, name, alpha):
    """At r = t an anchored network is the parent with adapters: that which ``load_lora_weights`` makes."""
    parent(name, tmp_path / "parent")
    net = adapted(name, tmp_path / "parent", adapter=Adapter(4, alpha))
    train(net)
    net.save_pretrained(tmp_path / "adapters")
    kind = getattr(diffusers, STOCK[name][0])
    names = [each for each in kind._get_signature_keys(kind)[0] if each not in (net.lora_prefix, "scheduler")]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    model = diffusers.SanaTransformer2DModel if name == "SANA" else type(net.diffusers_model)
    stock_model = model.from_pretrained(str(tmp_path / "parent"))
    if name == "text UNet":
        scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = kind(**dict.fromkeys(names), scheduler=scheduler, **{net.lora_prefix: stock_model})
    pipe.load_lora_weights(str(tmp_path / "adapters"), weight_name=ADAPTERS)

    stock = built(name, **({} if name == "SANA" else {"interval": None})).eval()
    loaded = getattr(pipe, net.lora_prefix).eval()
    z, _, t, *text = inputs(name)
    if name == "SANA":
        with torch.no_grad():
            found = loaded(z, text[0], stock.timestep(t), encoder_attention_mask=text[1], return_dict=False)[0]
    else:
        stock.model = loaded
        found = call(stock, z, t, t, *text)
    torch.testing.assert_close(found, call(net, z, t, t, *text), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, call(built(name, pretrained=str(tmp_path / "parent")), z, t, t, *text), atol=1e-3)


def test_a_time_embedding_that_was_fitted_anew_lies_beside_the_adapters(tmp_path):
    parent("SANA", tmp_path / "parent")
    settings = {"time_scale": 2.0, "finetuning": Finetuning(refit=True)}
    net = adapted("SANA", tmp_path / "parent", **settings)
    train(net)
    net.save_pretrained(tmp_path / "adapters")
    assert "time_embed.emb.timestep_embedder.linear_1.weight" in load_file(tmp_path / "adapters" / BESIDE)
    assert not any("time_embed" in each for each in net.parent_weights)
    for again in (settings, {"time_scale": 2.0}):
        assert same(built("SANA", pretrained=str(tmp_path / "adapters"), **again).state_dict(), net.state_dict())
    with pytest.raises(ValueError, match="cannot be fitted anew; merge them first"):
        net.refit_time(1.0)


@pytest.mark.parametrize(
    ("settings", "beside"),
    [
        ({"guidance_conditioning": True}, {"interval", "conditions", "velocity"}),
        ({"negative_times": True}, {"interval", "negative"}),
        ({"interval": DecoupledInterval(1)}, set()),
    ],
)
def test_all_parts_that_the_parent_lacked_train(tmp_path, settings, beside):
    parent("SANA", tmp_path / "parent")
    net = adapted("SANA", tmp_path / "parent", **settings)
    training = [name for name, weight in net.named_parameters() if weight.requires_grad and "lora" not in name]
    assert {part for name in training for part in name.split(".")} & {
        "interval",
        "conditions",
        "velocity",
        "negative",
    } == beside
    train(net)
    net.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / BESIDE).is_file() == bool(beside)
    assert same(built("SANA", pretrained=str(tmp_path / "adapters"), **settings).state_dict(), net.state_dict())


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        ("attn2.to_k", 2),
        ("transformer_blocks.1.attn1.to_q", 1),
        ("to_q", 4),
        ("conv_point", 2),
        ("linear_1", 2),  # the time embedding's own and the captions'; not the interval's
    ],
)
def test_targets_are_names_or_their_ends(tmp_path, target, layers):
    parent("SANA", tmp_path)
    net = adapted("SANA", tmp_path, adapter=Adapter(2, target_modules=[target]))
    changed = {name.partition(".lora_A")[0] for name, _ in net.named_parameters() if ".lora_A" in name}
    assert len(changed) == layers and all(name.endswith(f".{target}") for name in changed)
    train(net)
    expected = call(net, *inputs("SANA"))
    net.merge_adapters()
    torch.testing.assert_close(call(net, *inputs("SANA")), expected, rtol=1e-4, atol=1e-5)


@backbones
@pytest.mark.parametrize(("wrong", "near"), [("to_qq", "to_q"), ("to_out", r"to_out\.0"), ("interval", "linear")])
def test_a_wrong_target_is_refused_with_the_near_names(tmp_path, name, wrong, near):
    parent(name, tmp_path)
    with pytest.raises(
        ValueError, match=rf"^Adapter: target_modules: '{wrong}' ends .* near names are .*{near}"
    ) as said:
        adapted(name, tmp_path, adapter=Adapter(target_modules=["to_k", wrong]))
    assert "\n" not in str(said.value) and len(str(said.value)) < 300


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, r"alpha must be positive, got 0\.0"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=f"^Adapter: {said}"):
        Adapter(**settings)


@pytest.mark.parametrize(
    "finetuning",
    [Finetuning(trainable=["transformer_blocks"]), Finetuning(reset_text_projection=True), Finetuning(reset_time=0.02)],
)
def test_weights_that_would_change_under_adapters_are_refused(tmp_path, finetuning):
    parent("SANA", tmp_path)
    with pytest.raises(ValueError, match="changes weights that stay frozen under adapters"):
        adapted("SANA", tmp_path, finetuning=finetuning)


def test_adapters_need_weights(tmp_path):
    with pytest.raises(ValueError, match=r"adapter trains beside frozen weights; give them as net\.init_args\.pretr"):
        built("SANA", adapter=Adapter())
    assert SANA.num_layers == 2


class TestFolder:
    """A folder of adapters that is damaged, or whose parent is another."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        parent("SANA", tmp_path / "parent")
        net = adapted("SANA", tmp_path / "parent")
        train(net)
        net.save_pretrained(tmp_path / "adapters")
        return tmp_path / "adapters"

    def load(self, folder: Path, **settings: Any) -> Any:
        return built("SANA", pretrained=str(folder), **settings)

    def test_another_parent_at_its_place_is_refused(self, folder):
        other = built("SANA")
        other.save_pretrained(folder.parent / "parent")
        with pytest.raises(ValueError, match=r"was trained on other weights than those at .*parent now"):
            self.load(folder)

    def test_a_parent_that_is_gone_is_named(self, folder):
        (folder.parent / "parent").rename(folder.parent / "moved")
        with pytest.raises(ValueError, match=r"cannot load pretrained='.*parent'"):
            self.load(folder)

    def test_the_parent_is_found_from_another_folder(self, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        parent("SANA", Path("parent"))
        net = adapted("SANA", Path("parent"))
        train(net)
        net.save_pretrained(Path("adapters"))
        monkeypatch.chdir(tmp_path)
        loaded = self.load(tmp_path / "here/adapters")
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in net.state_dict().items())

    def test_other_settings_are_refused(self, folder):
        with pytest.raises(ValueError, match=r"holds Adapter\(rank=4, .*this experiment has Adapter\(rank=8"):
            self.load(folder, adapter=Adapter(8))
        assert self.load(folder, adapter=Adapter(4, alpha=6.0)).adapter.rank == 4

    def test_another_time_scale_is_refused(self, folder):
        with pytest.raises(ValueError, match=r"trained with time_scale 5\.0, this experiment has 3\.0"):
            self.load(folder, time_scale=3.0)

    @pytest.mark.parametrize("file", [ADAPTERS, BESIDE])
    @pytest.mark.parametrize("change", ["lack", "surplus", "shape", "gone", "cut"])
    def test_other_weights_are_refused(self, folder, file, change):
        tensors = load_file(folder / file)
        first = sorted(tensors)[0]
        if change == "lack":
            del tensors[first]
        elif change == "surplus":
            tensors[f"{first}.more"] = torch.zeros(1)
        else:
            tensors[first] = torch.zeros(3, 3)
        save_file(tensors, folder / file)
        if change == "gone":
            (folder / file).unlink()
        if change == "cut":
            (folder / file).write_bytes((folder / file).read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"adapters") as said:
            self.load(folder)
        assert "\n" not in str(said.value)

    @pytest.mark.parametrize(
        "about", [{}, [], {"parent": {"path": "p"}}, {"parent": 3, "adapter": {}, "fingerprint": ""}]
    )
    def test_a_configuration_that_describes_nothing_is_refused(self, folder, about):
        config = json.loads((folder / "config.json").read_text()) | {"_flow_adapter": about}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="_flow_adapter describes no adapters"):
            self.load(folder)


SIZE = SanaArchitecture(1, 2, 8, 2, 8, patch_size=12)


@pytest.mark.parametrize("copying", [FrozenNetwork, copied, lambda net: EMATarget(net, 0.9)])
def test_copies_of_compiled_networks_are_compiled(copying):
    made = copying(SanaFlowMap(SIZE, compile=True))
    net = getattr(made, "net", made)
    assert all(block._compiled_call_impl is not None for block in net.blocks)


def test_a_frozen_network_that_a_validation_moved_can_be_differentiated(monkeypatch):
    frozen = FrozenNetwork(SanaFlowMap(SIZE))
    # as a move to a GPU does: all weights are new tensors
    monkeypatch.setattr(frozen.net, "to", lambda device: frozen.net._apply(torch.clone))
    with torch.inference_mode():
        frozen.on(torch.device("meta"))
    assert not any(weight.is_inference() for weight in frozen.net.parameters())


@pytest.mark.parametrize("copying", [FrozenNetwork, lambda net: EMATarget(net, 0.9)])
def test_copies_have_the_parents_weights_in_common(tmp_path, copying):
    parent("SANA", tmp_path)
    net = adapted("SANA", tmp_path)
    twin = copying(net)
    ours, theirs = dict(net.named_parameters()), dict(twin.net.named_parameters())
    assert {name for name in ours if ours[name] is theirs[name]} == net.parent_weights & ours.keys()
    before = call(twin, *inputs("SANA"))
    train(net)
    assert torch.equal(call(twin, *inputs("SANA")), before)
    if isinstance(twin, EMATarget):
        twin.update(net)
        assert not torch.equal(call(twin, *inputs("SANA")), before)
        assert not twin.state().keys() & net.parent_weights
        other = EMATarget(net, 0.9)
        other.load(twin.state())
        assert same(other.net.state_dict(), twin.net.state_dict())


def test_a_network_without_adapters_has_copies_of_its_own(tmp_path):
    net = built("SANA", finetuning=Finetuning(trainable=["transformer_blocks"]))
    shared = {id(each) for each in FrozenNetwork(net).net.parameters()} & {id(each) for each in net.parameters()}
    assert not shared and isinstance(net, nn.Module)
