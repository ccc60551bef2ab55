"""Qwen3-VL with random weights, small enough to be made here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def save_tiny_qwen3_vl(folder: Path, words: Sequence[str], spaces: bool = True, answer: str | None = None) -> str:
    """The folder with a network in it.

    Args:
        folder: made if missing.
        words: the vocabulary besides the special tokens.
        spaces: whether a word after a space is another token than at the beginning, as in real vocabularies.
        answer: the token that is the answer to every question, whatever the image; without it, and with random
            weights, question and image both matter. An empty one makes all tokens equally probable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    forms = [*words, *(f" {word}" for word in words if spaces)]
    vocabulary = ["<pad>", "<unk>", *MARKS, *dict.fromkeys(forms)]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    model.pre_tokenizer = Split(Regex(r" ?\w+|[^\w\s]"), "isolated") if spaces else Whitespace()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, additional_special_tokens=MARKS, **names)
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessor(min_pixels=64, max_pixels=4096, **patches)
    Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(**patches), chat_template=CHAT).save_pretrained(folder)
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    ids = dict(
        zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
            map(vocabulary.index, MARKS[2:]),
            strict=True,
        )
    )
    torch.manual_seed(2)
    network = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1 and "lm_head" not in name:
                parameter.mul_(10)  # far from the linear range: image and question must tell
        network.lm_head.weight.mul_(20)
        if answer is not None:
            layers = network.model.language_model.layers
            for layer in layers:  # what is left is the embedding of the last token, which is always the same
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            network.lm_head.weight.zero_()
            if answer:
                last = network.model.language_model.embed_tokens.weight[vocabulary.index(MARKS[0])]
                network.lm_head.weight[vocabulary.index(answer)] = 100 * last / last.norm()
    network.save_pretrained(folder)
    return str(folder)
