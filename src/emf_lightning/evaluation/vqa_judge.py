"""Models that answer questions about pictures, behind one protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from emf_lightning.evaluation.devices import device_of


class VqaJudge(ABC):
    """Answers questions about a picture.

    Attributes:
        name: what scores are called after that rest on it; empty for a benchmark's own judge.
    """

    name: str

    @abstractmethod
    def answer(self, image: NDArray[np.uint8], questions: Sequence[str]) -> list[str]:
        """The answers, in lower case and without a full stop, about ``image`` ``[H, W, 3]``, 8-bit RGB."""


class BlipJudge(VqaJudge):
    """BLIP's question answering (arXiv 2201.12086), e.g. ``Salesforce/blip-vqa-capfilt-large``.

    Args:
        model: hub name or local folder in transformers' format.
        device: ``cuda``, ``cpu``; by default the process's own GPU where there is one.
        batch_size: questions answered at once.

    Raises:
        ValueError: if the model cannot be loaded.
    """

    name = "blip"

    def __init__(
        self, model: str = "Salesforce/blip-vqa-capfilt-large", device: str | None = None, batch_size: int = 16
    ) -> None:
        from transformers import BlipForQuestionAnswering, BlipProcessor

        self.device = device_of(device)
        self.batch_size = batch_size
        self.processor, network = _loaded("BlipJudge", model, BlipProcessor, BlipForQuestionAnswering)
        self.network = network.to(self.device)

    @torch.no_grad()
    def answer(self, image: NDArray[np.uint8], questions: Sequence[str]) -> list[str]:
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        answers: list[str] = []
        for first in range(0, len(questions), self.batch_size):
            batch = list(questions[first : first + self.batch_size])
            text = self.processor(text=batch, padding=True, return_tensors="pt").to(self.device)
            ids = self.network.generate(
                input_ids=text["input_ids"],
                attention_mask=text["attention_mask"],
                pixel_values=pixels.expand(len(batch), -1, -1, -1),
                max_new_tokens=8,
            )
            answers += self.processor.batch_decode(ids, skip_special_tokens=True)
        return [_plain(answer) for answer in answers]


class QwenVlJudge(VqaJudge):
    """A vision-language chat model, e.g. ``Qwen/Qwen2.5-VL-7B-Instruct``, asked for "yes" or "no" in one word.

    Args:
        model: hub name or local folder in transformers' format.
        device: see ``BlipJudge``.
        dtype: of the weights.

    Raises:
        ValueError: if the model cannot be loaded.
    """

    name = "qwen"

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        device: str | None = None,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = device_of(device)
        self.processor, network = _loaded(
            "QwenVlJudge", model, AutoProcessor, AutoModelForImageTextToText, dtype=getattr(torch, dtype)
        )
        self.network = network.to(self.device)

    @torch.no_grad()
    def answer(self, image: NDArray[np.uint8], questions: Sequence[str]) -> list[str]:
        from PIL import Image

        answers = []
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": f"{question} Answer yes or no, in one word."}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = self.processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt").to(self.device)
            ids = self.network.generate(**inputs, max_new_tokens=4, do_sample=False)
            answers += self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_plain(answer) for answer in answers]


class MplugJudge(VqaJudge):
    """DPG-Bench's own judge, mPLUG-large, by way of the package ``modelscope``, which is not installed with this one.

    Args:
        model: ModelScope's name of it, or a local folder.
        device: ``gpu`` or ``cpu``, in ModelScope's words.

    Raises:
        ValueError: where modelscope is not installed.
    """

    name = ""

    def __init__(self, model: str = "damo/mplug_visual-question-answering_coco_large_en", device: str = "gpu") -> None:
        try:
            from modelscope.pipelines import pipeline
        except ImportError as error:
            raise ValueError(
                "MplugJudge: the package modelscope is not installed; `pip install modelscope` with what its mPLUG "
                "needs, or take BlipJudge or QwenVlJudge, whose scores bear their names"
            ) from error
        self._pipeline: Any = pipeline("visual-question-answering", model=model, device=device)

    def answer(self, image: NDArray[np.uint8], questions: Sequence[str]) -> list[str]:
        from PIL import Image

        picture = Image.fromarray(image)
        return [_plain(self._pipeline({"image": picture, "question": question})["text"]) for question in questions]


def _loaded(asker: str, model: str, processor: Any, network: Any, **arguments: Any) -> tuple[Any, Any]:
    try:
        return (
            processor.from_pretrained(model, trust_remote_code=False),
            network.from_pretrained(model, use_safetensors=True, **arguments).eval().requires_grad_(False),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{asker}: cannot load model={model!r} ({reason}); download it first with `hf download {model}`, or give "
            "the path of a local folder"
        ) from error


def _plain(answer: str) -> str:
    return answer.strip().lower().rstrip(".")
