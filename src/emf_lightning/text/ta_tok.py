"""Text-aligned image tokenizer of BLIP3o-NEXT: an image becomes 729 discrete codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextAlignedTokenizer(nn.Module):
    """SigLIP2 vision tower, linear bottleneck and codebook (TA-Tok, arXiv 2506.18898).

    Encodes only: the decoder, the last layer, the last norm and the pooling head of the published weights are left out.
    Submodules have the published names. ``vision`` is the ``SiglipVisionConfig`` of the tower with the published number
    of layers; the codebook has ``codes`` entries of ``code_width`` channels.
    """

    def __init__(self, vision: Any, codes: int, code_width: int) -> None:
        from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionEmbeddings

        super().__init__()
        # features are the hidden states before the last layer (index -2), which is therefore not built
        shorter = type(vision).from_dict(vision.to_dict() | {"num_hidden_layers": vision.num_hidden_layers - 1})
        shorter._attn_implementation = "sdpa"
        self.side = vision.image_size
        self.heads = vision.num_attention_heads
        self.tokens = (vision.image_size // vision.patch_size) ** 2
        codebook = {"embedding": nn.Embedding(codes, code_width), "embedding_proj": nn.Linear(code_width, code_width)}
        projection = nn.Linear(vision.hidden_size, code_width)
        bottleneck = {"in_linear": projection, "regularizer": nn.ModuleDict(codebook)}
        encoder = {"embeddings": SiglipVisionEmbeddings(shorter), "encoder": SiglipEncoder(shorter)}
        self.encoder: Any = nn.ModuleDict(encoder)
        self.encode_task_layer = nn.Sequential(nn.Linear(vision.hidden_size, vision.hidden_size), nn.Tanh())
        self.bottleneck: Any = nn.ModuleDict(bottleneck)
        self._entries: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Codes ``[B, tokens]`` of images ``[B, 3, side, side]`` in [-1, 1], in raster order.

        A patch's code is the codebook entry with the largest cosine similarity. It is computed in fp32, because tens of
        entries tie in bf16.
        """
        dtype = next(self.parameters()).dtype
        patches = self.encoder["embeddings"](images.to(dtype))
        states = self.encoder["encoder"](inputs_embeds=patches).last_hidden_state
        queries = self.bottleneck["in_linear"](self.encode_task_layer(states))
        codebook = self._codebook()
        return torch.stack([(F.normalize(row.float(), dim=-1) @ codebook.T).argmax(-1) for row in queries])

    def _codebook(self) -> Tensor:
        """Codebook entries ``[codes, code_width]`` (SimVQ, arXiv 2411.02038), unit length, fp32; one copy a device."""
        raw, project = self.bottleneck["regularizer"]["embedding"], self.bottleneck["regularizer"]["embedding_proj"]
        if self._entries is None or self._entries.device != raw.weight.device:
            entries = F.linear(raw.weight.float(), project.weight.float(), project.bias.float())
            self._entries = F.normalize(entries, dim=-1)
        return self._entries
