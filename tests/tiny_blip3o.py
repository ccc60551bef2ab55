"""A tiny BLIP3o-NEXT checkpoint in the published layout, made with the real classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

WORDS = ["a", "photo", "of", "red", "blue", "green", "cube", "ball", "ring", "and", "under", "on", "two", "three"]
CHAT = ["system", "user", "assistant", "You", "are", "helpful", ".", "Please", "generate", "image", "based", "the"]
CODES = 48
SIDE, PATCH, HEADS = 14, 4, 2  # 3 x 3 patches, with a rest as at 384 px
TOKENS = 9
CONTEXT = 20
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SETTINGS = {"dtype": "float32", "image_size": SIDE, "image_heads": HEADS}
"""Arguments of ``BLIP3oNext`` beside the folder."""


def make_tokenizer():
    """Words for tokens, then the special ones in the published order: chat, tags, scales, codes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *WORDS, *CHAT, "following", "caption", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")
    fast.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    fast.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    fast.add_tokens(["<S0>", "<S1>", "<S2>"])
    fast.add_tokens([f"<I{code}>" for code in range(CODES)])
    return fast


def make_tensors(vocabulary: int, tie: bool = False) -> dict[str, Tensor]:
    """All tensors by their published names, those of the parts that are not read included."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, num_key_value_heads=1, head_dim=8, tie_word_embeddings=tie, initializer_range=0.3, **TINY
    )
    tower = SiglipVisionModel(SiglipVisionConfig(**TINY | {"num_hidden_layers": 3}, image_size=SIDE, patch_size=PATCH))
    tensors = Qwen3ForCausalLM(config).state_dict()
    if tie:
        del tensors["lm_head.weight"]
    images = {
        "encoder": tower,
        "encode_task_layer.0": nn.Linear(16, 16),
        "bottleneck.in_linear": nn.Linear(16, 6),
        "bottleneck.regularizer.embedding": nn.Embedding(CODES, 6),
        "bottleneck.regularizer.embedding_proj": nn.Linear(6, 6),
        "bottleneck.out_linear": nn.Linear(6, 6),
        "decode_task_layer.0": nn.Linear(16, 16),
        "decode_task_layer.2": nn.Linear(16, 16),
        "decoder.vision_model.post_layernorm": nn.LayerNorm(16),
    }
    for weight in (p for name, part in images.items() if name != "encoder" for p in part.parameters()):
        nn.init.normal_(weight, std=0.5)
    for name, part in images.items():
        tensors |= {f"model.vision_tower.vision_tower.{name}.{key}": value for key, value in part.state_dict().items()}
    tensors |= {f"model.diffusion_connector.0.{key}": v for key, v in nn.Linear(16, CONTEXT).state_dict().items()}
    tensors |= {f"model.diffusion_connector.2.{key}": v for key, v in nn.Linear(CONTEXT, CONTEXT).state_dict().items()}
    tensors["model.diffusion_connector.3.weight"] = torch.full((CONTEXT,), 5.5**0.5)
    tensors["model.sana.scale_shift_table"] = torch.zeros(2, 8)
    tensors["model.sana_vae.encoder.conv_in.weight"] = torch.zeros(4, 3, 3, 3)
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def make_config(tie: bool = False) -> dict:
    """``config.json`` as it is published, in Transformers 4's form."""
    tokenizer = make_tokenizer()
    number = tokenizer.convert_tokens_to_ids
    return {
        "architectures": ["blip3oQwenForInferenceLM"],
        "model_type": "blip3o_qwen_inference",
        "vocab_size": len(tokenizer) + 5,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "tie_word_embeddings": tie,
        "max_position_embeddings": 40960,
        "torch_dtype": "bfloat16",
        "mm_vision_tower": "ta_tok.pth",
        "diffusion_name_or_path": "SANA1.5_1.6B_1024px_diffusers",
        "image_start_tag_id": number("<im_start>"),
        "image_end_tag_id": number("<im_end>"),
        "scale_start_token_id": number("<S0>"),
        "scale_end_token_id": number("<S2>"),
        "image_start_token_id": number("<I0>"),
        "image_end_token_id": number(f"<I{CODES - 1}>"),
        "num_scale_tokens": 3,
        "num_image_tokens": CODES,
        **TINY,
    }


def save_checkpoint(folder: Path, shards: int = 1, tie: bool = False, **changes: Tensor | None) -> Path:
    """The folder of a new checkpoint; ``changes`` adds tensors, or leaves out (None)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(folder)
    config = make_config(tie)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = make_tensors(config["vocab_size"], tie) | changes
    present = {name: value for name, value in tensors.items() if value is not None}
    if shards == 1:
        save_file(present, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    place = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(present.items())[shard::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
