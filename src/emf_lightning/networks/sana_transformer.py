"""diffusers' SANA with the second time input, by subclassing alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from diffusers import SanaTransformer2DModel
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor

from emf_lightning.networks.guidance_conditioning import GUIDANCE_CONDITIONS, ConditionEmbedding, VelocityHead
from emf_lightning.networks.two_time.two_time_embedding import INTERVAL, NEGATIVE
from emf_lightning.pretrained.blip3o_sana import blip3o_sana_config, blip3o_sana_tensors, has_blip3o_sana
from emf_lightning.pretrained.loading import LoadedModel, PretrainedWeights, on_meta_device, read_model

_PROJECTION = "caption_projection.linear_1.weight"
"""The one weight whose shape depends on the text features' width."""


class IntervalSanaTransformer(SanaTransformer2DModel):
    """``SanaTransformer2DModel`` with a second time embedding, ``time_embed.interval``, beside its own parameters.

    It saves and loads in diffusers' format. Its forward pass is SANA's: ``TwoTimeEmbedding`` joins the two embeddings.
    """

    @functools.wraps(SanaTransformer2DModel.__init__)  # type: ignore[misc]  # from_pretrained reads the configuration off this signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.config.num_attention_heads * self.config.attention_head_dim
        self.time_embed = AdaLayerNormSingle(width)  # drawn anew: the documented runs drew their weights in this order
        self.time_embed.add_module(INTERVAL, AdaLayerNormSingle(width))

    @classmethod
    def from_flow(cls, weights: PretrainedWeights, context_width: int | None = None) -> IntervalSanaTransformer:
        """A model with published or own weights; parameters that a flow lacks start without an effect.

        The weights are in diffusers' format, or a whole BLIP3o-NEXT or EMF checkpoint; with a ``context_width`` the
        projection of the text features starts anew. On the meta device only the configuration is read. Raises
        ``OSError`` if there are no such weights, ``ValueError`` if they are not those of a SANA as configured.
        """
        try:
            loaded = cls._read(weights, context_width)
        except RuntimeError as error:  # a line for each weight of another size
            raise _other_weights(weights, str(error).partition("\n")[2].partition("\n")[0].strip()) from error
        model, initializers = loaded.model, loaded.model.initializers()
        lost = [key for key in loaded.missing if not key.startswith(tuple(initializers))]
        lost += [key for key in loaded.mismatched if key != _PROJECTION or context_width is None]
        if lost or loaded.surplus:
            raise _other_weights(weights, f"missing {sorted(lost)[:3]}, surplus {sorted(loaded.surplus)[:3]}")
        if context_width is not None:  # diffusers leaves unset memory there
            model.caption_projection.linear_1.reset_parameters()
        for prefix, initialize in initializers.items():
            if any(key.startswith(prefix) for key in loaded.missing):
                initialize()
        return model.train()  # diffusers returns models in eval mode

    @classmethod
    def _read(cls, weights: PretrainedWeights, context_width: int | None) -> LoadedModel:
        changes: dict[str, Any] = {} if context_width is None else {"caption_channels": context_width}
        if weights.subfolder is not None or not has_blip3o_sana(weights.path):
            return read_model(cls, weights, **changes)
        if on_meta_device():
            return LoadedModel(cls.from_config(blip3o_sana_config(weights.path) | changes))
        tensors = blip3o_sana_tensors(weights.path)
        model = cls.from_config(blip3o_sana_config(weights.path, tensors) | changes)
        if changes:
            tensors[_PROJECTION] = model.state_dict()[_PROJECTION]
        missing, surplus = model.load_state_dict(tensors, strict=False)
        return LoadedModel(model, missing, surplus=surplus)

    def initializers(self) -> dict[str, Callable[[], None]]:
        """Initializers of the parameters that a flow's weights lack, by prefix; they keep the flow's output."""
        return {"time_embed.interval.": functools.partial(self.copy_to, INTERVAL)}

    def init_copies(self) -> None:
        """Copies the pretrained time embedding to the interval's (arXiv 2604.18168, section 3) and negative times'."""
        self.copy_to(INTERVAL)
        self.copy_to(NEGATIVE)

    def copy_to(self, name: str) -> None:
        """Copies the time embedding to another one of its layers, if the network has it."""
        if hasattr(self.time_embed, name):
            own = {k: v for k, v in self.time_embed.state_dict().items() if k.startswith(("emb.", "linear."))}
            getattr(self.time_embed, name).load_state_dict(own)


class TwinSanaTransformer(IntervalSanaTransformer):
    """A SANA with a second flow at negative times, by a time embedding of its own, ``time_embed.negative.*``."""

    @functools.wraps(SanaTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.time_embed.add_module(NEGATIVE, AdaLayerNormSingle(self.time_embed.linear.in_features))
        self.copy_to(NEGATIVE)

    def initializers(self) -> dict[str, Callable[[], None]]:
        """Those of the interval's embedding and of negative times'."""
        return super().initializers() | {"time_embed.negative.": functools.partial(self.copy_to, NEGATIVE)}


class GuidedSanaTransformer(IntervalSanaTransformer):
    """A SANA that takes guidance conditions, and returns u and v, twice the channels.

    Attributes:
        guidance: the conditions ``[B, K]`` of the next forward pass; they shift the time embedding.
    """

    proj_out: VelocityHead
    guidance: Tensor | None = None

    @functools.wraps(SanaTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width, out = self.proj_out.in_features, self.proj_out.out_features
        self.time_embed.conditions = ConditionEmbedding(GUIDANCE_CONDITIONS, width)
        self.proj_out = VelocityHead(width, out, out // self.config.patch_size**2)

    def add_guidance(self) -> None:
        """Lets ``guidance`` shift the time embedding's output; behind all hooks that are there."""
        self.time_embed.register_forward_hook(self._shift)

    def _shift(self, embedding: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.guidance is not None
        modulation, embedded = output
        shift, embedded_conditions = self.time_embed.conditions(self.guidance.to(modulation.dtype))
        return modulation + shift.repeat(1, modulation.shape[1] // shift.shape[1]), embedded + embedded_conditions

    def initializers(self) -> dict[str, Callable[[], None]]:
        """Those of the interval's embedding, the conditions' embedding and the velocity's projection."""
        conditions = self.time_embed.conditions
        return super().initializers() | {
            "time_embed.conditions.": conditions.reset_parameters,
            "proj_out.velocity.": self.proj_out.init_velocity,
        }


def _other_weights(weights: PretrainedWeights, difference: str) -> ValueError:
    return ValueError(
        f"{weights}: its weights are not those of a SANA transformer with this configuration ({difference}); check the "
        "path and its config.json"
    )
