"""diffusers' SANA with the second time input, by subclassing alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from diffusers.utils import logging

from emf_lightning.flow.objectives.improved_meanflow import Guidance
from emf_lightning.networks.two_time.embedding import IntervalEmbedding
from emf_lightning.networks.two_time.rules import IntervalInput
from emf_lightning.networks.velocity_head import ConditionEmbedding, VelocityHead
from emf_lightning.pretrained.blip3o_sana import is_released, read_released, released_config
from emf_lightning.pretrained.files import config_of

_PROJECTION = "caption_projection.linear_1.weight"
"""The one weight whose shape the text features' width decides."""


class IntervalSanaTransformer(SanaTransformer2DModel):
    """``SanaTransformer2DModel`` whose time embedding also takes r, handed in as ``guidance``.

    Its parameters keep SANA's names; new ones are ``time_embed.interval.*``. It saves and loads in diffusers' format.
    """

    @functools.wraps(SanaTransformer2DModel.__init__)  # type: ignore[misc]  # from_pretrained reads the configuration off this signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.time_embed = IntervalEmbedding(self.config.num_attention_heads * self.config.attention_head_dim)

    @classmethod
    def from_flow(
        cls, path: str, subfolder: str | None = None, context_width: int | None = None
    ) -> IntervalSanaTransformer:
        """A model with published or own weights; what they do not know starts as if it were not there.

        On the meta device only its configuration is read.

        Args:
            path: a folder or hub name in diffusers' format, or one with a BLIP3o-NEXT or EMF checkpoint.
            subfolder: of ``path``, in diffusers' format.
            context_width: of the text features, where their projection is to start anew.

        Raises:
            OSError: where ``path`` is none of these.
            ValueError: where its weights are not those that its configuration speaks of.
        """
        try:
            model, missing, surplus = cls._load(path, subfolder, context_width)
        except RuntimeError as error:  # a line for each weight of another size
            raise _other_weights(path, str(error).partition("\n")[2].partition("\n")[0].strip()) from error
        starts = model.starts()
        lost = [key for key in missing if not key.startswith(tuple(starts))]
        if lost or surplus:
            raise _other_weights(path, f"missing {sorted(lost)[:3]}, surplus {sorted(surplus)[:3]}")
        if context_width is not None:  # what diffusers leaves there is unset memory
            model.caption_projection.linear_1.reset_parameters()
        for prefix, start in starts.items():
            if any(key.startswith(prefix) for key in missing):
                start()
        return model.train()  # diffusers hands out models to sample with

    @classmethod
    def _load(
        cls, path: str, subfolder: str | None, context_width: int | None
    ) -> tuple[IntervalSanaTransformer, list[str], list[str]]:
        """The model, and the names that its weights lack and that they have too many."""
        released = subfolder is None and is_released(path)
        fresh = {} if context_width is None else {"caption_channels": context_width}
        if torch.get_default_device().type == "meta":
            return cls.from_config((released_config(path) if released else config_of(path, subfolder)) | fresh), [], []
        if not released:
            with _without_its_warnings():
                model, info = cls.from_pretrained(
                    path,
                    subfolder=subfolder,
                    output_loading_info=True,
                    low_cpu_mem_usage=False,
                    use_safetensors=True,
                    ignore_mismatched_sizes=bool(fresh),
                    **fresh,
                )
            odd = [key for key, *_ in info["mismatched_keys"] if key != _PROJECTION]
            return model, info["missing_keys"] + odd, info["unexpected_keys"]
        weights = read_released(path)
        model = cls.from_config(weights.config | fresh)
        if fresh:
            weights.tensors[_PROJECTION] = model.state_dict()[_PROJECTION]
        return model, *model.load_state_dict(weights.tensors, strict=False)

    def starts(self) -> dict[str, Any]:
        """What a flow-matching network's weights lack, by prefix, and what sets it so that they draw as they did."""
        return {"time_embed.interval.": self.time_embed.duplicate}

    def take(self, interval: IntervalInput) -> None:
        """Sets how r and t are combined, once, after the weights are there."""
        self.time_embed.rule = interval
        interval.prepare(self)


class ImprovedSanaTransformer(IntervalSanaTransformer):
    """The same with guidance's settings as conditions, in ``guidance`` behind r, and v beside u, twice the channels."""

    proj_out: VelocityHead

    @functools.wraps(SanaTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width, out = self.proj_out.in_features, self.proj_out.out_features
        self.time_embed.conditions = ConditionEmbedding(Guidance.CONDITIONS, width)
        self.proj_out = VelocityHead(width, out, out // self.config.patch_size**2)

    def starts(self) -> dict[str, Any]:
        """The interval's embedding, the conditions' and the velocity's projection."""
        conditions = self.time_embed.conditions
        assert conditions is not None
        improved = {"time_embed.conditions.": conditions.start, "proj_out.velocity.": self.proj_out.start}
        return super().starts() | improved


@contextmanager
def _without_its_warnings() -> Iterator[None]:
    """A context in which diffusers lists no weights that are new: ``from_flow`` sets them, or raises."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _other_weights(path: str, difference: str) -> ValueError:
    return ValueError(
        f"{path}: its weights are not those of a SANA transformer with this configuration ({difference}); check the "
        "path and its config.json"
    )
