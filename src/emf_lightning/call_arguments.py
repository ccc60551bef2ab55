"""What a call of the pipeline may be given, as users of diffusers know it: each argument is checked in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from emf_lightning.flow.sampling import StepEnd
from emf_lightning.text.base import NULL_CAPTION, TextFeatures
from emf_lightning.text.plain import prompt_texts

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents",)
"""Tensors of a step that its callback may see and replace."""


def check_counts(prompts: int, **counts: Any) -> None:
    """Raises ``ValueError`` where there is nothing to generate."""
    if prompts and all(isinstance(count, int) and count >= 1 for count in counts.values()):
        return
    given = ", ".join(f"{name}={count}" for name, count in counts.items())
    raise ValueError(
        f"EMFPipeline: nothing to generate for {prompts} prompts, {given}; each must be a whole number, at least 1"
    )


def check_output(output_type: str, side: int, height: int | None, width: int | None) -> None:
    """Raises ``ValueError`` for another kind of output, and for a size that the model does not generate."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    for name, size in (("height", height), ("width", width)):
        if size is not None and size != side:
            raise ValueError(f"{name}: this model generates images of {side} x {side} pixels alone, got {size!r}")


def negative_prompts(negative: Any, prompts: int, evaluations: int, scale: float) -> list[str]:
    """The captions of guidance's other half, one or as many as ``prompts``.

    Raises:
        ValueError: for another number, and where the network is evaluated once a step, so that nothing would read them.
    """
    if negative is None:
        return [NULL_CAPTION]
    texts = prompt_texts(negative, "negative_prompt")
    if len(texts) not in (1, prompts):
        raise ValueError(f"negative_prompt: must be one text, or one for each of {prompts} prompts, got {len(texts)}")
    if evaluations == 1 and set(texts) != {NULL_CAPTION}:
        raise ValueError(
            f"negative_prompt: with guidance_scale={scale:g} this model evaluates its network once a step, with the "
            "prompt alone, so nothing would read it; leave it out, or raise guidance_scale if the model allows it"
        )
    return texts


def given_features(embeds: Tensor, mask: Tensor | None, length: int, width: int) -> TextFeatures:
    """Token features that the caller gives instead of prompts.

    Raises:
        ValueError: for another shape.
    """
    if embeds.ndim != 3 or embeds.shape[1:] != (length, width):
        raise ValueError(f"prompt_embeds: must be [B, {length}, {width}], got {list(embeds.shape)}")
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
    if mask.shape != embeds.shape[:2]:
        raise ValueError(f"prompt_attention_mask: must be {list(embeds.shape[:2])}, got {list(mask.shape)}")
    return TextFeatures(embeds.float(), mask.bool())


def check_generators(generator: Any, images: int) -> None:
    """Raises ``ValueError`` for a list with another number of generators than images."""
    if isinstance(generator, Sequence) and len(generator) != images:
        raise ValueError(f"generator: must be one, or a list of one for each of {images} images, got {len(generator)}")


def step_end_of(
    pipeline: Any, callback: Callable[..., dict[str, Any]] | None, tensors: Sequence[str] = CALLBACK_TENSORS
) -> StepEnd | None:
    """diffusers' ``callback_on_step_end`` as the samplers call it.

    Raises:
        ValueError: for tensors that a step does not have.
    """
    if callback is None:
        return None
    names = list(getattr(callback, "tensor_inputs", tensors))  # of diffusers' PipelineCallback
    if unknown := [name for name in names if name not in CALLBACK_TENSORS]:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: a step has {', '.join(CALLBACK_TENSORS)} alone, got {unknown[0]!r}"
        )

    def step_end(step: int, t: Tensor, samples: Tensor) -> Tensor:
        known = {"latents": samples}
        changed: Tensor = (callback(pipeline, step, t, {n: known[n] for n in names}) or {}).get("latents", samples)
        return changed

    return step_end
