"""Conversion of mmdetection's Mask2Former checkpoints to transformers' weight names."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

SWIN = "model.pixel_level_module.encoder.encoder.layers"
BLOCK = r"backbone\.stages\.(\d+)\.blocks\.(\d+)"
PIXELS = "model.pixel_level_module.decoder"
QUERIES = "model.transformer_module"
MASKS = f"{QUERIES}.decoder.mask_predictor"
LAYERS = r"panoptic_head\.transformer_decoder\.layers"
ENCODER = r"panoptic_head\.pixel_decoder\.encoder\.layers"

NAMES: tuple[tuple[str, str], ...] = (
    (r"backbone\.patch_embed\.projection", "model.pixel_level_module.encoder.embeddings.patch_embeddings.projection"),
    (r"backbone\.patch_embed\.norm", "model.pixel_level_module.encoder.embeddings.norm"),
    (rf"{BLOCK}\.norm1", rf"{SWIN}.\1.blocks.\2.layernorm_before"),
    (rf"{BLOCK}\.norm2", rf"{SWIN}.\1.blocks.\2.layernorm_after"),
    (rf"{BLOCK}\.attn\.w_msa\.relative_position", rf"{SWIN}.\1.blocks.\2.attention.self.relative_position"),
    (rf"{BLOCK}\.attn\.w_msa\.proj", rf"{SWIN}.\1.blocks.\2.attention.output.dense"),
    (rf"{BLOCK}\.ffn\.layers\.0\.0", rf"{SWIN}.\1.blocks.\2.intermediate.dense"),
    (rf"{BLOCK}\.ffn\.layers\.1", rf"{SWIN}.\1.blocks.\2.output.dense"),
    (r"backbone\.stages\.(\d+)\.downsample\.(norm|reduction)", rf"{SWIN}.\1.downsample.\2"),
    *((rf"backbone\.norm{i}", f"model.pixel_level_module.encoder.hidden_states_norms.stage{i + 1}") for i in range(4)),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv", rf"{PIXELS}.input_projections.\1.0"),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn", rf"{PIXELS}.input_projections.\1.1"),
    (r"panoptic_head\.pixel_decoder\.level_encoding\.weight", rf"{PIXELS}.level_embed"),
    (rf"{ENCODER}\.(\d+)\.attentions\.0", rf"{PIXELS}.encoder.layers.\1.self_attn"),
    (rf"{ENCODER}\.(\d+)\.norms\.0", rf"{PIXELS}.encoder.layers.\1.self_attn_layer_norm"),
    (rf"{ENCODER}\.(\d+)\.norms\.1", rf"{PIXELS}.encoder.layers.\1.final_layer_norm"),
    (rf"{ENCODER}\.(\d+)\.ffns\.0\.layers\.0\.0", rf"{PIXELS}.encoder.layers.\1.fc1"),
    (rf"{ENCODER}\.(\d+)\.ffns\.0\.layers\.1", rf"{PIXELS}.encoder.layers.\1.fc2"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv", f"{PIXELS}.adapter_1.0"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn", f"{PIXELS}.adapter_1.1"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv", f"{PIXELS}.layer_1.0"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn", f"{PIXELS}.layer_1.1"),
    (r"panoptic_head\.pixel_decoder\.mask_feature", f"{PIXELS}.mask_projection"),
    # cross-attention comes first, then self-attention
    (rf"{LAYERS}\.(\d+)\.attentions\.0\.attn", rf"{QUERIES}.decoder.layers.\1.cross_attn"),
    (rf"{LAYERS}\.(\d+)\.attentions\.1\.attn", rf"{QUERIES}.decoder.layers.\1.self_attn"),
    (rf"{LAYERS}\.(\d+)\.norms\.0", rf"{QUERIES}.decoder.layers.\1.cross_attn_layer_norm"),
    (rf"{LAYERS}\.(\d+)\.norms\.1", rf"{QUERIES}.decoder.layers.\1.self_attn_layer_norm"),
    (rf"{LAYERS}\.(\d+)\.norms\.2", rf"{QUERIES}.decoder.layers.\1.final_layer_norm"),
    (rf"{LAYERS}\.(\d+)\.ffns\.0\.layers\.0\.0", rf"{QUERIES}.decoder.layers.\1.fc1"),
    (rf"{LAYERS}\.(\d+)\.ffns\.0\.layers\.1", rf"{QUERIES}.decoder.layers.\1.fc2"),
    (r"panoptic_head\.transformer_decoder\.post_norm", f"{QUERIES}.decoder.layernorm"),
    (r"panoptic_head\.query_embed", f"{QUERIES}.queries_embedder"),
    (r"panoptic_head\.query_feat", f"{QUERIES}.queries_features"),
    (r"panoptic_head\.level_embed", f"{QUERIES}.level_embed"),
    *((rf"panoptic_head\.mask_embed\.{2 * i}", f"{MASKS}.mask_embedder.{i}.0") for i in range(3)),
    (r"panoptic_head\.cls_embed", "class_predictor"),
)
"""Patterns of mmdetection 2's names -> names in transformers; .weight and .bias follow."""

IGNORED = re.compile(r".*\.relative_position_index|panoptic_head\.loss_.*|panoptic_fusion_head\..*")
"""Constants that transformers computes itself, and weights that only training needs."""

NUMBERS: list[Any] = [
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
]
"""Classes of pickled numpy scalars, under the names of numpy 1 and 2: ``meta`` may hold measured scores."""


def convert_checkpoint(path: str) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights for transformers of mmdetection's Mask2Former checkpoint at ``path``.

    Code in the file is never executed: beside tensors it may hold plain values and numpy scalars.

    Raises:
        ValueError: for another file.
    """
    remedy = "give mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth or its like"
    try:
        with torch.serialization.safe_globals(NUMBERS):
            # not mapped into memory: mmdetection publishes files in PyTorch's format from before 1.6
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"Mask2FormerDetector: no file {path}; {remedy}") from None
    except Exception as error:  # many types, depending on the file
        if refused := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            alone = f"{path.removesuffix('.pth')}-weights.pth"
            raise ValueError(
                f"Mask2FormerDetector: {path} holds a {refused[1]}, which is not loaded because a file can do harm "
                f'that way; if you trust it, write its weights alone into another: python -c "import torch; '
                f"torch.save(torch.load('{path}', 'cpu', weights_only=False)['state_dict'], '{alone}')\""
            ) from error
        kind = type(error).__name__
        raise ValueError(f"Mask2FormerDetector: {path} cannot be read as a checkpoint ({kind}); {remedy}") from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else {}
    try:
        return configuration(weights), rename_weights(weights)
    except KeyError as error:
        reason = f"is no Mask2Former of mmdetection 2, it has {error.args[0]}"
        raise ValueError(f"Mask2FormerDetector: {path} {reason}; {remedy}") from error


def rename_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under transformers' names.

    Joint projections of queries, keys and values are split. Channels of patch merging are reordered: mmdetection
    unfolds 2 x 2 patches channel by channel and row by row, Swin's authors stack them position by position, column by
    column.

    Raises:
        KeyError: for an unknown name.
    """
    result: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if IGNORED.fullmatch(name):
            continue
        if match := re.fullmatch(rf"{BLOCK}\.attn\.w_msa\.qkv\.(weight|bias)", name):
            stem = f"{SWIN}.{match[1]}.blocks.{match[2]}.attention.self"
            names = [f"{stem}.{part}.{match[3]}" for part in ("query", "key", "value")]
        else:
            new = _new_name(name)
            if ".downsample." in new:
                weight = weight.reshape(*weight.shape[:-1], -1, 2, 2).transpose(-3, -1).flatten(-3)
            match = re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", new)
            names = [f"{match[1]}.{part}_proj.{match[2]}" for part in "qkv"] if match else [new]
        result |= {new: part.contiguous() for new, part in zip(names, weight.chunk(len(names)), strict=True)}
    return result


def _new_name(name: str) -> str:
    for pattern, replacement in NAMES:
        if match := re.match(rf"{pattern}(?=[._]|$)", name):
            return match.expand(replacement) + name[match.end() :]
    raise KeyError(f"a weight called {name}")


def configuration(weights: dict[str, Tensor]) -> Any:
    """The configuration for transformers, from the names and shapes of mmdetection's ``weights``.

    Raises:
        KeyError: for weights of something else.
    """
    from transformers import Mask2FormerConfig, SwinConfig

    def shape(name: str) -> torch.Size:
        if name not in weights:
            raise KeyError(f"no {name}")
        return weights[name].shape

    def count(pattern: str) -> int:
        return len({match[1] for name in weights if (match := re.match(pattern, name))})

    stages = count(r"backbone\.stages\.(\d+)\.")
    attention = "blocks.0.attn.w_msa.relative_position_bias_table"
    tables = [shape(f"backbone.stages.{i}.{attention}") for i in range(max(stages, 1))]
    width = shape("backbone.patch_embed.projection.weight")[0]
    classes, hidden = shape("panoptic_head.cls_embed.weight")
    offsets = shape("panoptic_head.pixel_decoder.encoder.layers.0.attentions.0.sampling_offsets.weight")[0]
    return Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=width,
            depths=[count(rf"backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
            num_heads=[table[1] for table in tables],
            window_size=(int(tables[0][0] ** 0.5) + 1) // 2,
            mlp_ratio=shape("backbone.stages.0.blocks.0.ffn.layers.0.0.weight")[0] / width,
            drop_path_rate=0.0,
            out_features=[f"stage{i + 1}" for i in range(stages)],
        ),
        num_labels=classes - 1,
        num_queries=shape("panoptic_head.query_embed.weight")[0],
        hidden_dim=hidden,
        feature_size=shape("panoptic_head.pixel_decoder.level_encoding.weight")[1],
        mask_feature_size=shape("panoptic_head.pixel_decoder.mask_feature.weight")[0],
        num_attention_heads=offsets // (3 * 4 * 2),  # three levels, four points, two coordinates
        encoder_layers=count(rf"{ENCODER}\.(\d+)\."),
        decoder_layers=count(rf"{LAYERS}\.(\d+)\.") + 1,  # transformers counts the first mask prediction, too
        encoder_feedforward_dim=shape("panoptic_head.pixel_decoder.encoder.layers.0.ffns.0.layers.0.0.weight")[0],
        dim_feedforward=shape("panoptic_head.transformer_decoder.layers.0.ffns.0.layers.0.0.weight")[0],
        dropout=0.0,
    )
