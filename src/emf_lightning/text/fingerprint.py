"""Digests of weights, tokenizers and settings."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fingerprint(**parts: Any) -> str:
    """SHA-256 of named parts, sorted by name, as JSON; values that JSON does not know are converted by ``str``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all weights, in name order."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        # bytes, because numpy has no bfloat16
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a transformers tokenizer: the whole pipeline of a fast one, the vocabulary of a slow one."""
    if tokenizer.is_fast:
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
        # calls leave their truncation and padding in the pipeline; they are no property of the tokenizer
        pipeline.pop("truncation", None)
        pipeline.pop("padding", None)
    else:
        pipeline = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return fingerprint(pipeline=pipeline, special_tokens=tokenizer.special_tokens_map)
