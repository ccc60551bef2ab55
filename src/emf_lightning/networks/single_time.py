"""diffusers' backbones that are told one time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.prediction import Prediction, PredictVelocity
from emf_lightning.pretrained.files import config_of


class SingleTimeFlowMap(FlowMapNetwork):
    """Base of flow maps on a backbone with one time input: it is told t, and u(z, r, t) is the same for every r.

    That is all that flow matching, FGM and SCFlow ask for; what asks for intervals (MeanFlow and its relatives) needs a
    network that hears of r. Weights are loaded and saved in diffusers' format, under diffusers' names.

    Args:
        kind: diffusers' class.
        size: its arguments where it starts from scratch.
        pretrained: folder or hub name in diffusers' format to start from instead.
        subfolder: e.g. ``unet`` for a whole pipeline's repository.
        prediction: what the backbone's output stands for.
        time_scale: factor on t before the backbone's time embedding.
        gradient_checkpointing: keep no activations inside the blocks and compute them again in the backward pass.
        latent_channels: C of the latents.
        latent_size: H = W of the latents.
        context_width: D of the text features.

    Raises:
        ValueError: where pretrained weights are not to be had or disagree with the data.
    """

    def __init__(
        self,
        kind: Any,
        size: dict[str, Any] | None,
        pretrained: str | None,
        subfolder: str | None,
        prediction: Prediction | None,
        time_scale: float,
        gradient_checkpointing: bool,
        latent_channels: int,
        latent_size: int,
        context_width: int,
    ) -> None:
        super().__init__()
        self.prediction = prediction or PredictVelocity()
        self.time_scale = time_scale
        self.latent_channels, self.latent_size, self.context_width = latent_channels, latent_size, context_width
        if pretrained is None:
            assert size is not None
            self.model = kind(
                in_channels=latent_channels, out_channels=latent_channels, sample_size=latent_size, **size
            )
        else:
            self.model = _pretrained(type(self).__name__, kind, pretrained, subfolder)
            self._check(pretrained)
        self.model.register_to_config(**{f"_flow_{name}": value for name, value in self.meaning.items()})
        if gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
            self.recomputed = True

    def said_widths(self) -> dict[str, int]:
        """What the weights' configuration says of the text features' widths, by what it is called."""
        return {}

    def _check(self, pretrained: str) -> None:
        config = self.model.config
        for name, ours, theirs in (
            ("latent channels", self.latent_channels, config.in_channels),
            *((name, self.context_width, width) for name, width in self.said_widths().items()),
            *((name, value, config.get(f"_flow_{name}") or value) for name, value in self.meaning.items()),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{type(self).__name__}: {pretrained} was trained with {name} {theirs!r}, this experiment has "
                    f"{ours!r}; make the data, encoder or net settings agree, or start from other weights"
                )

    @property
    def meaning(self) -> dict[str, str | float]:
        """The prediction and the time scale."""
        return super().meaning | {"time_scale": self.time_scale}

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """A UNet's stages, down, middle and up."""
        return [*self.model.down_blocks, self.model.mid_block, *self.model.up_blocks]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes ``config.json`` and safetensors in diffusers' format; ``pretrained=directory`` reads them back."""
        self.model.save_pretrained(str(directory))

    def scaled(self, t: Tensor) -> Tensor:
        """What the backbone is told at ``t`` ``[B]``, fp32."""
        assert t.dtype in (torch.float32, torch.float64)
        return t * self.time_scale


def _pretrained(name: str, kind: Any, pretrained: str, subfolder: str | None) -> Any:
    where = pretrained if subfolder is None else f"{pretrained} (subfolder {subfolder})"
    try:
        if torch.get_default_device().type == "meta":
            return kind.from_config(config_of(pretrained, subfolder))
        model, info = kind.from_pretrained(
            pretrained, subfolder=subfolder, low_cpu_mem_usage=False, output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name}: no readable weights at pretrained={where}: give a folder in diffusers' format, or a hub name "
            f"that can be reached (`hf download {pretrained}` beforehand); check `subfolder`"
        ) from error
    odd = [*info["missing_keys"], *info["unexpected_keys"]]
    if odd:
        raise ValueError(
            f"{name}: the weights at {where} are not those of its config.json ({odd[0]} and {len(odd) - 1} more are "
            "missing or surplus): download both again"
        )
    return model.train()  # diffusers hands out models to sample with
