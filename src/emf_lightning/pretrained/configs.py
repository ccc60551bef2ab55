"""Configurations of the published weights that experiments name, for planning without a download.

Except for SANA's, they say what differs from the defaults of their classes in diffusers and transformers.
"""

from __future__ import annotations

from typing import Any

_SANA = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "patch_size": 1,
    "sample_size": 32,
    "interpolation_scale": None,
    "qk_norm": "rms_norm_across_heads",
}
_DC_AE = {
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
_GEMMA = {"model_type": "gemma2"}
_INTERNVL3_2B = {  # its language model, Qwen2.5-1.5B
    "model_type": "qwen2",
    "vocab_size": 151_674,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
_BLIP3O_NEXT = {
    "model_type": "blip3o_qwen",
    "vocab_size": 151_669 + 2 + 3 + 65_536,  # Qwen3's tokens, two tags, the scales and the image codes
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_image_tokens": 65_536,
    "num_scale_tokens": 3,
    "diffusion_name_or_path": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
}

_SD_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 256,
}
_SD3_VAE = _SD_VAE | {
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768}
_SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
_SD35_MEDIUM = _SD3 | {
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
}
_SD35_LARGE = _SD3 | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
_FLUX: dict[str, Any] = {"guidance_embeds": True}
_FLUX_VAE = _SD3_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
_PIXART_SIGMA = {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False}
_AURAFLOW = {"pos_embed_max_size": 9216}
_SDXL_VAE = _SD_VAE | {"sample_size": 1024, "scaling_factor": 0.13025}
_CLIP_L = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_BIGG = _CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10_240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_PILE_T5_XL = {
    "model_type": "umt5",
    "vocab_size": 32_128,
    "d_model": 2048,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
}
_SD3_TEXT = {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_BIGG, "text_encoder_3": _T5_XXL}
_FLUX_TEXT = {"text_encoder": _CLIP_L, "text_encoder_2": _T5_XXL}

_PIPELINES: dict[str, dict[str, dict[str, Any]]] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": {"transformer": _SD3, "vae": _SD3_VAE, **_SD3_TEXT},
    "stabilityai/stable-diffusion-3.5-medium": {"transformer": _SD35_MEDIUM, "vae": _SD3_VAE, **_SD3_TEXT},
    "stabilityai/stable-diffusion-3.5-large": {"transformer": _SD35_LARGE, "vae": _SD3_VAE, **_SD3_TEXT},
    "black-forest-labs/FLUX.1-dev": {"transformer": _FLUX, "vae": _FLUX_VAE, **_FLUX_TEXT},
    "black-forest-labs/FLUX.1-schnell": {"transformer": {}, "vae": _FLUX_VAE, **_FLUX_TEXT},
    "Freepik/flux.1-lite-8B": {"transformer": _FLUX | {"num_layers": 8}, "vae": _FLUX_VAE, **_FLUX_TEXT},
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": {"transformer": _PIXART_SIGMA, "vae": _SDXL_VAE, "text_encoder": _T5_XXL},
    "Alpha-VLLM/Lumina-Image-2.0": {"transformer": {"cap_feat_dim": 2304}, "vae": _FLUX_VAE, "text_encoder": _GEMMA},
    "Qwen/Qwen-Image": {"transformer": {}},
    "fal/AuraFlow-v0.3": {"transformer": _AURAFLOW, "vae": _SDXL_VAE, "text_encoder": _PILE_T5_XL},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers/transformer": _SANA,
    "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers/transformer": _SANA | {"num_layers": 60},
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers/vae": _DC_AE,
    "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers/vae": _DC_AE,
    "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": _DC_AE,
    "BLIP3o/BLIP3o-NEXT-SFT-3B": _BLIP3O_NEXT,
    "Efficient-Large-Model/gemma-2-2b-it": _GEMMA,
    "google/gemma-2-2b-it": _GEMMA,
    "OpenGVLab/InternVL3-2B-hf": _INTERNVL3_2B,
    "stabilityai/sd-vae-ft-mse": _SD_VAE,
    "XCLiu/2_rectified_flow_from_sd_1_5/vae": _SD_VAE,
    "XCLiu/2_rectified_flow_from_sd_1_5/unet": _SD15_UNET,
    "XCLiu/2_rectified_flow_from_sd_1_5/text_encoder": _CLIP_L,
    **{f"{name}/{part}": config for name, parts in _PIPELINES.items() for part, config in parts.items()},
}
"""Configurations by hub name and subfolder, with the keys of diffusers and transformers.

SANA's and DC-AE's are those of diffusers' conversion scripts, Gemma's and Qwen3-1.7B's those of their release. That
BLIP3o-NEXT's language model is Qwen3-1.7B is inferred from its name (3B with a SANA of 1.6B): not checked against its
weights. Those of FLUX.1, SD3.5, PixArt, Lumina, Qwen-Image and AuraFlow agree with the published sizes; they were not
read off the files. They serve planning alone: downloaded weights come with their own configuration.
"""
