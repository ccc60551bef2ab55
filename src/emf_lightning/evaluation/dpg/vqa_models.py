"""Visual question answering models behind one base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from emf_lightning.evaluation.devices import device_of
from emf_lightning.pretrained.loading import load_pretrained, unreadable
from emf_lightning.text.fingerprint import weights_digest


class VqaModel(ABC):
    """Base class of the models that answer questions about an image.

    Attributes:
        name: part of the names of scores that use the model; empty for the benchmark's own model.
    """

    name: str

    def settings(self) -> dict[str, Any]:
        """Everything that comparable scores must share: class and weights; plain values."""
        return {"judge": type(self).__name__}

    @abstractmethod
    def answer(self, image: NDArray[np.uint8], questions: Sequence[str]) -> list[str]:
        """Answers about ``image`` ``[H, W, 3]``, 8-bit RGB, in lower case and without a full stop."""


class _TransformersVqa(VqaModel):
    """Loading of models in transformers' format."""

    def _load(self, model: str, processor: Any, network: Any, device: str | None, dtype: str | None = None) -> None:
        caller = type(self).__name__
        self.device, self._model = device_of(device), Path(model).name
        loaded = load_pretrained(caller, network, model, frozen=True, dtype=dtype, argument="model")
        self.network = loaded.to(self.device)
        try:
            self.processor = processor.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise unreadable(caller, model, error, "the processor of model") from error

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self.network)[:12]

    def settings(self) -> dict[str, Any]:
        dtype = str(self.network.dtype).removeprefix("torch.")
        return super().settings() | {"judge_model": self._model, "judge_weights": self._digest, "judge_dtype": dtype}


class BlipVqa(_TransformersVqa):
    """BLIP's question answering (arXiv 2201.12086), e.g. ``Salesforce/blip-vqa-capfilt-large``.

    Args:
        model: hub name or local folder in transformers' format.
        device: ``cuda``, ``cpu``; by default the process's own GPU where there is one.
        batch_size: questions in one batch.

    Raises:
        ValueError: if the model cannot be loaded, or its weights are incomplete or of another architecture.
    """

    name = "blip"

    def __init__(
        self, model: str = "Salesforce/blip-vqa-capfilt-large", device: str | None = None, batch_size: int = 16
    ) -> None:
        from transformers import BlipForQuestionAnswering, BlipProcessor

        self.batch_size = batch_size
        self._load(model, BlipProcessor, BlipForQuestionAnswering, device)

    @torch.no_grad()
    def answer(self, image: NDArray[np.uint8], questions: Sequence[str]) -> list[str]:
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        tokens = self.processor(text=list(questions))["input_ids"]
        answers = [""] * len(questions)
        for batch in _of_one_length(tokens, self.batch_size):
            ids = torch.tensor([tokens[i] for i in batch], device=self.device)
            images, mask = pixels.expand(len(batch), -1, -1, -1), torch.ones_like(ids)
            found = self.network.generate(input_ids=ids, attention_mask=mask, pixel_values=images, max_new_tokens=8)
            for i, answer in zip(batch, self.processor.batch_decode(found, skip_special_tokens=True), strict=True):
                answers[i] = _plain(answer)
        return answers


class QwenVqa(_TransformersVqa):
    """A vision-language chat model, e.g. ``Qwen/Qwen2.5-VL-7B-Instruct``, asked for "yes" or "no" in one word.

    Args:
        model: hub name or local folder in transformers' format.
        device: see ``BlipVqa``.
        dtype: of the weights.

    Raises:
        ValueError: if the model cannot be loaded, or its weights are incomplete or of another architecture.
    """

    name = "qwen"

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        device: str | None = None,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._load(model, AutoProcessor, AutoModelForImageTextToText, device, dtype)

    @torch.no_grad()
    def answer(self, image: NDArray[np.uint8], questions: Sequence[str]) -> list[str]:
        from PIL import Image

        answers = []
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": f"{question} Answer yes or no, in one word."}]
            chat = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
            inputs = self.processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt").to(self.device)
            ids = self.network.generate(**inputs, max_new_tokens=4, do_sample=False)
            answers += self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_plain(answer) for answer in answers]


class MplugVqa(VqaModel):
    """DPG-Bench's own model, mPLUG-large, from the package ``modelscope``, which is not installed with this one.

    Args:
        model: ModelScope's model name, or a local folder.
        device: ``gpu`` or ``cpu``, as ModelScope calls them.

    Raises:
        ValueError: if modelscope is not installed.
    """

    name = ""

    def __init__(self, model: str = "damo/mplug_visual-question-answering_coco_large_en", device: str = "gpu") -> None:
        try:
            from modelscope.pipelines import pipeline
        except ImportError as error:
            raise ValueError(
                "MplugVqa: the package modelscope is not installed; `pip install modelscope` with what its mPLUG "
                "needs, or use BlipVqa or QwenVqa, whose scores bear their names"
            ) from error
        self._model = Path(model).name
        self._pipeline: Any = pipeline("visual-question-answering", model=model, device=device)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"judge_model": self._model}

    def answer(self, image: NDArray[np.uint8], questions: Sequence[str]) -> list[str]:
        from PIL import Image

        asked = [{"image": Image.fromarray(image), "question": question} for question in questions]
        return [_plain(self._pipeline(inputs)["text"]) for inputs in asked]


def _of_one_length(tokens: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of ``tokens`` in batches of at most ``size`` questions of the same length.

    BLIP's decoder does not mask the padding of questions: there must be none.
    """
    for length in dict.fromkeys(map(len, tokens)):
        indices = [i for i, question in enumerate(tokens) if len(question) == length]
        yield from (indices[first : first + size] for first in range(0, len(indices), size))


def _plain(answer: str) -> str:
    return answer.strip().lower().rstrip(".")
