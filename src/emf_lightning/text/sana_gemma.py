"""SANA's text encoder: Gemma-2 with an instruction before the caption."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from emf_lightning.text.base import NULL_CAPTION, TextFeatures
from emf_lightning.text.pretrained import PretrainedTextEncoder


class SanaGemma(PretrainedTextEncoder):
    """SANA's and SANA-1.5's text encoder (arXiv 2410.10629, section 3.1), equal to diffusers' pipeline.

    Captions follow SANA's instruction in lower case. The features are the first and the last 299 tokens of the padded
    sequence, so that the network does not see the instruction's tokens. The null caption has no instruction.

    Args:
        model: Gemma-2-2B-it by hub name or folder.
        length: L, number of tokens kept.
        instruction: text before the caption; default: SANA's instruction in diffusers.
        dtype: of weights and computation.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = "Efficient-Large-Model/gemma-2-2b-it",
        length: int = 300,
        instruction: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        revision: str | None = None,
    ) -> None:
        super().__init__(model, length, dtype=dtype, revision=revision)
        self.instruction = sana_instruction() if instruction is None else instruction
        self.template = self.instruction + "{caption}"
        self._before = len(self.tokenizer(self.instruction)["input_ids"])

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features ``[B, L, D]``, float32."""
        rows = [self._row(caption) for caption in captions]
        self._truncation.add(len(rows), sum(truncated for *_, truncated in rows))
        states = self._padded_states([ids for ids, *_ in rows])
        parts = [self._part(*state, room) for state, (_, room, _) in zip(states, rows, strict=True)]
        return TextFeatures(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))

    def _row(self, caption: str) -> tuple[list[int], int, bool]:
        """Token ids, the length to which SANA pads or truncates them, and True if truncated."""
        instructed = caption != NULL_CAPTION
        text = (self.instruction if instructed else "") + caption.lower().strip()
        room = self._before + self.length - 2 if instructed else self.length
        ids, more = (self._ids([text], room + extra)[0] for extra in (0, 1))
        return ids or [self._padding], room, len(more) > len(ids)

    def _padded_states(self, rows: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
        """Hidden states ``[n, D]`` and mask ``[n]`` of each sequence, padded to the longest, n."""
        longest = max(map(len, rows))
        device = next(self.tower.parameters()).device
        ids = torch.tensor([row + [self._padding] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows], device=device)
        with torch.autocast(device.type, enabled=False):
            states = self._states(ids, mask.long()).float().masked_fill(~mask[..., None], 0.0)
        if not states.isfinite().all():
            raise ValueError(f"SanaGemma: infinite features with dtype={self.dtype!r}; use dtype: float32")
        return list(zip(states, mask, strict=True))

    def _part(self, states: Tensor, mask: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """The first position and the last L - 1 of a sequence padded to ``room``."""
        short = max(room - len(mask), 0)
        states, mask = nn.functional.pad(states, (0, 0, 0, short))[:room], nn.functional.pad(mask, (0, short))[:room]
        rest = slice(room - self.length + 1, room)
        return torch.cat([states[:1], states[rest]]), torch.cat([mask[:1], mask[rest]])


def sana_instruction() -> str:
    """The instruction that diffusers' ``SanaPipeline`` puts before a prompt."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
