from __future__ import annotations

from collections import OrderedDict
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.swin.modeling_swin import SwinPatchMerging

from emf_lightning.evaluation.geneval.mask2former import Mask2FormerDetector
from emf_lightning.evaluation.geneval.mmdet_checkpoint import configuration, convert_checkpoint, rename_weights
from tests.evaluation.mmdet_weights import PUBLISHED, mmdet_weights


def loaded(weights, folder):
    torch.save({"state_dict": weights, "meta": {"CLASSES": ("person",)}}, folder / "mask2former.pth")
    config, state = convert_checkpoint(str(folder / "mask2former.pth"))
    return Mask2FormerForUniversalSegmentation.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True
    )


def test_every_weight_finds_its_place_and_only_unused_ones_are_missing(tmp_path):
    network, report = loaded(mmdet_weights(), tmp_path)

    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert {name.rpartition(".")[0].rpartition("encoder.")[2] for name in report["missing_keys"]} <= {
        "swin.layernorm",
        "layernorm",
        "criterion",
    }
    detector = Mask2FormerDetector(str(tmp_path / "mask2former.pth"), short_side=64)
    for name, weight in network.state_dict().items():
        if "layernorm." not in name.replace("decoder.layernorm", ""):
            assert torch.equal(weight, detector.network.state_dict()[name]), name


META = {
    "env_info": "sys.platform: linux\nPython: 3.7.10",
    "config": "model = dict(type='Mask2Former')\n",
    "seed": 42,
    "mmdet_version": "2.23.0+",
    "CLASSES": ("person", "bicycle"),
    "PALETTE": [(220, 20, 60), (119, 11, 32)],
    "epoch": 1,
    "iter": 368750,
    "time": "Wed May  4 00:17:56 2022",
    "hook_msgs": {"best_score": np.float64(0.46), "best_epochs": np.int64(50), "last_ckpt": "iter_368750.pth"},
}
"""Entries that mmdetection's runner writes beside the weights."""


def test_a_file_as_mmdetection_publishes_it_is_read_whatever_its_meta(tmp_path):
    weights = OrderedDict(mmdet_weights())
    weights._metadata = OrderedDict({"": {"version": 1}})
    path = tmp_path / "mask2former.pth"
    torch.save({"meta": META, "state_dict": weights}, path, _use_new_zipfile_serialization=False)
    _, state = convert_checkpoint(str(path))

    assert torch.equal(state["class_predictor.weight"], weights["panoptic_head.cls_embed.weight"])


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numbers_of_either_numpy_are_read(tmp_path, core):
    path = tmp_path / "mask2former.pth"
    torch.save({"meta": META, "state_dict": mmdet_weights()}, path, _use_new_zipfile_serialization=False)
    here = f"c{np.float64(0).__reduce__()[0].__module__}\n".encode()
    content = path.read_bytes()
    assert here in content
    path.write_bytes(content.replace(here, f"cnumpy.{core}.multiarray\n".encode()))
    convert_checkpoint(str(path))


def test_what_might_be_executed_is_refused_with_a_way_out_that_works(tmp_path):
    path = tmp_path / "mask2former.pth"
    torch.save({"meta": {"folder": PurePosixPath("runs")}, "state_dict": mmdet_weights()}, path)
    with pytest.raises(ValueError, match=r"holds a pathlib\S*PurePosixPath, which is not loaded") as refusal:
        convert_checkpoint(str(path))
    command = str(refusal.value).partition("python -c ")[2]
    exec(command.strip('"'), {})
    convert_checkpoint(str(tmp_path / "mask2former-weights.pth"))


def test_the_published_size_is_read_off_the_shapes():
    weights = mmdet_weights(**PUBLISHED, device="meta")
    config = configuration(weights)
    with torch.device("meta"):
        network = Mask2FormerForUniversalSegmentation(config)

    assert sum(weight.numel() for name, weight in rename_weights(weights).items()) == sum(
        weight.numel()
        for name, weight in network.named_parameters()
        if not name.endswith(("swin.layernorm.weight", "swin.layernorm.bias"))
    )
    assert (config.decoder_layers, config.encoder_layers, config.num_attention_heads) == (10, 6, 8)
    assert (list(config.backbone_config.depths), config.backbone_config.window_size) == ([2, 2, 18, 2], 7)


def test_the_head_of_queries_keys_and_values_is_cut_in_this_order(tmp_path):
    weights = mmdet_weights()
    state = loaded(weights, tmp_path)[0].state_dict()
    ours = "model.transformer_module.decoder.layers.0"
    theirs = "panoptic_head.transformer_decoder.layers.0"

    joint = torch.cat([state[f"{ours}.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(joint, weights[f"{theirs}.attentions.1.attn.in_proj_weight"])
    assert torch.equal(
        state[f"{ours}.cross_attn.in_proj_weight"], weights[f"{theirs}.attentions.0.attn.in_proj_weight"]
    )
    assert torch.equal(state[f"{ours}.cross_attn_layer_norm.weight"], weights[f"{theirs}.norms.0.weight"])
    assert torch.equal(state[f"{ours}.self_attn_layer_norm.weight"], weights[f"{theirs}.norms.1.weight"])


def test_patches_are_merged_as_mmdetection_unfolds_them():
    weights = mmdet_weights()
    stage = "backbone.stages.0.downsample"
    norm, reduction = nn.LayerNorm(48), nn.Linear(48, 24, bias=False)
    norm.load_state_dict({name: weights[f"{stage}.norm.{name}"] for name in ("weight", "bias")})
    reduction.load_state_dict({"weight": weights[f"{stage}.reduction.weight"]})
    merging = SwinPatchMerging(dim=12)
    prefix = "model.pixel_level_module.encoder.encoder.layers.0.downsample."
    merging.load_state_dict(
        {n.removeprefix(prefix): w for n, w in rename_weights(weights).items() if n.startswith(prefix)}
    )

    image = torch.randn(1, 12, 6, 8)
    unfolded = nn.functional.unfold(image, 2, stride=2).transpose(1, 2)  # what mmdetection's PatchMerging does
    ours = merging(image.flatten(2).transpose(1, 2), (6, 8))
    torch.testing.assert_close(ours, reduction(norm(unfolded)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no file"),
        (b"zip", "cannot be read as a checkpoint"),
        ({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}}, "is no Mask2Former of mmdetection 2"),
        ({"state_dict": mmdet_weights() | {"roi_head.weight": torch.zeros(1)}}, "has a weight called roi_head.weight"),
    ],
    ids=["none", "garbage", "another model", "a stranger"],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, content, said):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"{said}.*give mask2former_swin-s"):
        Mask2FormerDetector(str(path))
