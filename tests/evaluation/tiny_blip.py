"""BLIP's question answering with random weights, small enough to be made here."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertTokenizerFast, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
WORDS = ["is", "there", "a", "dog", "cat", "?", "yes", "no"]


def save_tiny_blip(folder: Path, scale: float = 20.0) -> str:
    """The folder with a network in it.

    Its matrices are ``scale`` times what they are at the start of a training: 20 is far from the linear range, so that
    every word of a question has a say.
    """
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS) + "\n")
    torch.manual_seed(0)
    text = {
        "vocab_size": len(SPECIAL + WORDS),
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 5,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    network = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    network.save_pretrained(folder)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), additional_special_tokens=SPECIAL[5:])
    BlipProcessor(processor, tokenizer).save_pretrained(folder)
    return str(folder)
