"""The text-aligned image tokenizer of BLIP3o-NEXT: a picture as 729 numbers out of a language model's vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextAlignedTokenizer(nn.Module):
    """A SigLIP2 vision tower, a linear bottleneck and a code book (TA-Tok, arXiv 2506.18898).

    Only what turns pictures into codes: the decoder, the last layer, the last norm and the pooling head of the
    published weights are left out. Children have the published names.

    Args:
        vision: the tower's configuration, a ``SiglipVisionConfig`` with the published number of layers.
        codes: entries of the code book.
        code_width: channels of an entry.
    """

    def __init__(self, vision: Any, codes: int, code_width: int) -> None:
        from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionEmbeddings

        super().__init__()
        # Features are the hidden states before the last layer (index -2), so that it need not be there at all.
        shorter = type(vision).from_dict(vision.to_dict() | {"num_hidden_layers": vision.num_hidden_layers - 1})
        shorter._attn_implementation = "sdpa"
        self.side = vision.image_size
        self.heads = vision.num_attention_heads
        self.tokens = (vision.image_size // vision.patch_size) ** 2
        regularizer = {
            "embedding": nn.Embedding(codes, code_width),
            "embedding_proj": nn.Linear(code_width, code_width),
        }
        bottleneck = {
            "in_linear": nn.Linear(vision.hidden_size, code_width),
            "regularizer": nn.ModuleDict(regularizer),
        }
        encoder = {"embeddings": SiglipVisionEmbeddings(shorter), "encoder": SiglipEncoder(shorter)}
        self.encoder: Any = nn.ModuleDict(encoder)
        self.encode_task_layer = nn.Sequential(nn.Linear(vision.hidden_size, vision.hidden_size), nn.Tanh())
        self.bottleneck: Any = nn.ModuleDict(bottleneck)
        self._book: Tensor | None = None

    def forward(self, pictures: Tensor) -> Tensor:
        """The codes ``[B, tokens]`` of pictures ``[B, 3, side, side]`` in [-1, 1], row by row from the upper left.

        The code of a patch is the entry of the largest cosine, in fp32 whatever the tower's dtype: in bf16 tens of
        entries are equally far.
        """
        dtype = next(self.parameters()).dtype
        patches = self.encoder["embeddings"](pictures.to(dtype))
        states = self.encoder["encoder"](inputs_embeds=patches).last_hidden_state
        wanted = self.bottleneck["in_linear"](self.encode_task_layer(states))
        book = self._code_book()
        return torch.stack([(F.normalize(row.float(), dim=-1) @ book.T).argmax(-1) for row in wanted])

    def _code_book(self) -> Tensor:
        """The entries ``[codes, code_width]`` (SimVQ, arXiv 2411.02038), unit length, fp32; computed once a device."""
        raw, project = self.bottleneck["regularizer"]["embedding"], self.bottleneck["regularizer"]["embedding_proj"]
        if self._book is None or self._book.device != raw.weight.device:
            entries = F.linear(raw.weight.float(), project.weight.float(), project.bias.float())
            self._book = F.normalize(entries, dim=-1)
        return self._book
