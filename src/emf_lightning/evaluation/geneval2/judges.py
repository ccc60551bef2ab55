"""Judges that give the probability of an answer to a question about an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from emf_lightning.evaluation.dpg.vqa_models import QwenVqa

PUBLISHED = "Qwen3-VL-8B-Instruct"
"""Judge of the published scores."""


class AnswerJudge(ABC):
    """Base class of the models that say how likely an answer is.

    Attributes:
        name: part of the names of scores that use the judge; empty for the benchmark's own.
    """

    name: str

    def settings(self) -> dict[str, Any]:
        """Everything that comparable scores must share: class and weights; plain values."""
        return {"judge": type(self).__name__}

    @abstractmethod
    def tokens(self, spelling: str) -> list[int]:
        """The ids of the tokens of a word at the beginning of an answer, without special ones."""

    @abstractmethod
    def text(self, token: int) -> str:
        """The text of one token."""

    @abstractmethod
    def probabilities(self, image: NDArray[np.uint8], question: str) -> NDArray[np.float32]:
        """Probability of each token of the vocabulary to be the first of the answer about ``image`` ``[H, W, 3]``."""


class QwenJudge(QwenVqa, AnswerJudge):
    """A vision-language chat model in transformers' format, asked to answer in one word; Qwen3-VL-8B in the paper.

    One user turn holds the image and the question. Probabilities are the softmax of the first token's raw logits. The
    image is not resized beyond what the model's processor does.

    Args:
        model: hub name or local folder; a model of another name becomes part of the score's name.
        device: ``cuda``, ``cpu``; by default the process's own GPU where there is one.
        dtype: of the weights.

    Raises:
        ValueError: if the model cannot be loaded, or its weights are incomplete or of another architecture.
    """

    def __init__(
        self,
        model: str = "Qwen/Qwen3-VL-8B-Instruct",
        device: str | None = None,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    ) -> None:
        super().__init__(model, device, dtype)
        own = Path(model).name
        self.name = "" if own == PUBLISHED else own

    def tokens(self, spelling: str) -> list[int]:
        return list(self.processor.tokenizer(spelling, add_special_tokens=False)["input_ids"])

    def text(self, token: int) -> str:
        return str(self.processor.tokenizer.decode([token]))

    @torch.no_grad()
    def probabilities(self, image: NDArray[np.uint8], question: str) -> NDArray[np.float32]:
        from PIL import Image

        content = [{"type": "image"}, {"type": "text", "text": f"{question} Answer in one word."}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt").to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            logits = self.network(**inputs, logits_to_keep=1).logits[0, -1]
        return logits.float().softmax(-1).cpu().numpy()  # type: ignore[no-any-return]
