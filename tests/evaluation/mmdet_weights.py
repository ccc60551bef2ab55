"""Random weights with the names and shapes of mmdetection 2's Mask2Former, as its sources build it."""

from __future__ import annotations

import torch
from torch import Tensor


def mmdet_weights(
    width: int = 12,
    depths: tuple[int, ...] = (1, 1, 1, 1),
    heads: tuple[int, ...] = (1, 2, 3, 4),
    window: int = 4,
    hidden: int = 32,
    queries: int = 20,
    encoder_layers: int = 1,
    decoder_layers: int = 1,
    encoder_feedforward: int = 64,
    decoder_feedforward: int = 128,
    classes: int = 80,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """A state dict; on the meta device the published size costs nothing."""
    weights: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        weights[name] = torch.randn(shape, device=device) * 0.1

    def linear(name: str, out: int, into: int, *kernel: int, bias: bool = True) -> None:
        add(f"{name}.weight", out, into, *kernel)
        if bias:
            add(f"{name}.bias", out)

    def norm(name: str, channels: int) -> None:
        add(f"{name}.weight", channels)
        add(f"{name}.bias", channels)

    widths = [width * 2**i for i in range(len(depths))]
    linear("backbone.patch_embed.projection", width, 3, 4, 4)
    norm("backbone.patch_embed.norm", width)
    for i, (depth, channels) in enumerate(zip(depths, widths, strict=True)):
        for j in range(depth):
            block = f"backbone.stages.{i}.blocks.{j}"
            norm(f"{block}.norm1", channels)
            add(f"{block}.attn.w_msa.relative_position_bias_table", (2 * window - 1) ** 2, heads[i])
            weights[f"{block}.attn.w_msa.relative_position_index"] = torch.zeros(
                window**2, window**2, dtype=torch.long, device=device
            )
            linear(f"{block}.attn.w_msa.qkv", 3 * channels, channels)
            linear(f"{block}.attn.w_msa.proj", channels, channels)
            norm(f"{block}.norm2", channels)
            linear(f"{block}.ffn.layers.0.0", 4 * channels, channels)
            linear(f"{block}.ffn.layers.1", channels, 4 * channels)
        if i < len(depths) - 1:
            norm(f"backbone.stages.{i}.downsample.norm", 4 * channels)
            linear(f"backbone.stages.{i}.downsample.reduction", 2 * channels, 4 * channels, bias=False)
        norm(f"backbone.norm{i}", channels)

    pixels = "panoptic_head.pixel_decoder"
    for i, channels in enumerate(widths[:0:-1]):
        linear(f"{pixels}.input_convs.{i}.conv", hidden, channels, 1, 1)
        norm(f"{pixels}.input_convs.{i}.gn", hidden)
    for i in range(encoder_layers):
        layer = f"{pixels}.encoder.layers.{i}"
        linear(f"{layer}.attentions.0.sampling_offsets", 8 * 3 * 4 * 2, hidden)
        linear(f"{layer}.attentions.0.attention_weights", 8 * 3 * 4, hidden)
        linear(f"{layer}.attentions.0.value_proj", hidden, hidden)
        linear(f"{layer}.attentions.0.output_proj", hidden, hidden)
        linear(f"{layer}.ffns.0.layers.0.0", encoder_feedforward, hidden)
        linear(f"{layer}.ffns.0.layers.1", hidden, encoder_feedforward)
        norm(f"{layer}.norms.0", hidden)
        norm(f"{layer}.norms.1", hidden)
    add(f"{pixels}.level_encoding.weight", 3, hidden)
    linear(f"{pixels}.lateral_convs.0.conv", hidden, widths[0], 1, 1, bias=False)
    norm(f"{pixels}.lateral_convs.0.gn", hidden)
    linear(f"{pixels}.output_convs.0.conv", hidden, hidden, 3, 3, bias=False)
    norm(f"{pixels}.output_convs.0.gn", hidden)
    linear(f"{pixels}.mask_feature", hidden, hidden, 1, 1)

    for i in range(decoder_layers):
        layer = f"panoptic_head.transformer_decoder.layers.{i}"
        for j in range(2):  # to the image, then among the queries
            attention = f"{layer}.attentions.{j}.attn"
            add(f"{attention}.in_proj_weight", 3 * hidden, hidden)
            add(f"{attention}.in_proj_bias", 3 * hidden)
            linear(f"{attention}.out_proj", hidden, hidden)
        linear(f"{layer}.ffns.0.layers.0.0", decoder_feedforward, hidden)
        linear(f"{layer}.ffns.0.layers.1", hidden, decoder_feedforward)
        for j in range(3):
            norm(f"{layer}.norms.{j}", hidden)
    norm("panoptic_head.transformer_decoder.post_norm", hidden)
    add("panoptic_head.query_embed.weight", queries, hidden)
    add("panoptic_head.query_feat.weight", queries, hidden)
    add("panoptic_head.level_embed.weight", 3, hidden)
    linear("panoptic_head.cls_embed", classes + 1, hidden)
    for i in (0, 2, 4):
        linear(f"panoptic_head.mask_embed.{i}", hidden, hidden)
    weights["panoptic_head.loss_cls.class_weight"] = torch.ones(classes + 1, device=device)
    return weights


PUBLISHED = {
    "width": 96,
    "depths": (2, 2, 18, 2),
    "heads": (3, 6, 12, 24),
    "window": 7,
    "hidden": 256,
    "queries": 100,
    "encoder_layers": 6,
    "decoder_layers": 9,
    "encoder_feedforward": 1024,
    "decoder_feedforward": 2048,
}
"""The size of mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco."""
