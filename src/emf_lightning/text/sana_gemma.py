"""SANA's text encoder: Gemma-2 with an instruction before the caption."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from emf_lightning.text.base import NULL_CAPTION, TextFeatures
from emf_lightning.text.plain import neutral
from emf_lightning.text.pretrained import PretrainedTextEncoder, planned_inputs


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
        # on the meta device there is no tokenizer; a token of English text has four letters or so
        counted = self.tokenizer and len(self.tokenizer(self.instruction)["input_ids"])
        self._before = len(self.instruction) // 4 if counted is None else counted

    def planned_passes(self) -> tuple[Callable[[], object], ...]:
        """The model's, with the instruction's tokens as well."""
        return (lambda: self.tower(**planned_inputs(self._before + self.length - 2)),)

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        sequences = [self._sequence(caption) for caption in captions]
        self._truncation.add(len(sequences), sum(truncated for *_, truncated in sequences))
        states, mask = self._padded_states([ids for ids, *_ in sequences])
        parts = [self._part(*part) for part in zip(states, mask, [length for _, length, _ in sequences], strict=True)]
        return TextFeatures(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))

    def encode_negative(self, captions: Sequence[str]) -> TextFeatures:
        return self._encode_with(captions, instruction="")

    def _sequence(self, caption: str) -> tuple[list[int], int, bool]:
        """Token ids, the length to which SANA pads or truncates them, and True if truncated."""
        instructed = caption != NULL_CAPTION and bool(self.instruction)
        text = (self.instruction if instructed else "") + neutral(caption.lower().strip(), self._special)
        length = self._before + self.length - 2 if instructed else self.length
        ids, more = (self._ids([text], length + extra)[0] for extra in (0, 1))
        return ids or [self._padding], length, len(more) > len(ids)

    def _part(self, states: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first and the last L - 1 positions of a sequence padded to ``length``."""
        short = max(length - len(mask), 0)
        states = nn.functional.pad(states, (0, 0, 0, short))[:length]
        mask = nn.functional.pad(mask, (0, short))[:length]
        rest = slice(length - self.length + 1, length)
        return torch.cat([states[:1], states[rest]]), torch.cat([mask[:1], mask[rest]])


def sana_instruction() -> str:
    """The instruction that diffusers' ``SanaPipeline`` puts before a prompt."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
