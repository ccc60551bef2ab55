"""Text encoders of PixArt and Lumina-Image 2.0, as in their pipelines: padding is masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from emf_lightning.text.base import NULL_CAPTION, TextFeatures
from emf_lightning.text.pretrained import PretrainedTextEncoder

LUMINA_INSTRUCTION = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)
"""What diffusers' ``Lumina2Pipeline`` puts before a prompt."""


class PixArtTextEncoder(PretrainedTextEncoder):
    """PixArt's text encoder: T5-XXL's hidden states of the caption in lower case.

    Args:
        model: folder or hub name of the pipeline.
        length: L, number of tokens kept; 300 for PixArt-Sigma, 120 for PixArt-alpha.
        dtype: of weights and computation; float16 overflows in T5.
        revision: branch, tag or commit on the hub.
        subfolder: of the encoder; the tokenizer is beside it.

    Raises:
        ValueError: if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        length: int = 300,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        revision: str | None = None,
        subfolder: str | None = "text_encoder",
    ) -> None:
        super().__init__(model, length, dtype=dtype, revision=revision, subfolder=subfolder)

    def _text(self, caption: str) -> str:
        return super()._text(caption.lower().strip())


class Lumina2TextEncoder(PretrainedTextEncoder):
    """Lumina-Image 2.0's text encoder: Gemma-2's last but one hidden states, behind the pipeline's instruction.

    The null caption has no instruction.

    Args:
        model: folder or hub name of the pipeline.
        length: L, number of tokens kept, those of the instruction included.
        dtype: of weights and computation.
        revision: branch, tag or commit on the hub.
        subfolder: of the encoder; the tokenizer is beside it.

    Raises:
        ValueError: if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = "Alpha-VLLM/Lumina-Image-2.0",
        length: int = 256,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        revision: str | None = None,
        subfolder: str | None = "text_encoder",
    ) -> None:
        super().__init__(model, length, LUMINA_INSTRUCTION + "{caption}", -2, dtype, revision, subfolder)

    def encode_negative(self, captions: Sequence[str]) -> TextFeatures:
        return self._encode_with(captions, template="{caption}")

    def _text(self, caption: str) -> str:
        return super()._text(caption) if caption != NULL_CAPTION else NULL_CAPTION
