"""Digests of what a frozen encoder's features depend on."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fingerprint(**parts: Any) -> str:
    """The sha256 of named parts, in the order of their names; each must survive JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """The sha256 of all weights' names, dtypes, shapes and bytes, in name order, one tensor at a time."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        # Bytes rather than values: numpy knows no bfloat16.
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256 of a transformers tokenizer: its whole pipeline if it is a fast one, its vocabulary otherwise."""
    if tokenizer.is_fast:
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls leave their truncation and padding behind in the pipeline; they say nothing about the tokenizer.
        pipeline.pop("truncation", None)
        pipeline.pop("padding", None)
    else:
        pipeline = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return fingerprint(pipeline=pipeline, special_tokens=tokenizer.special_tokens_map)
