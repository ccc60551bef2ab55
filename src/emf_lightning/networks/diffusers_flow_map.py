"""Base of the flow maps on diffusers' models: loading, saving and recorded parametrization."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emf_lightning.networks.architecture_checks import require
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.prediction import Prediction, PredictVelocity
from emf_lightning.pretrained.loading import PretrainedWeights


class DiffusersFlowMap(FlowMapNetwork):
    """A flow map on a model of diffusers, saved in its format, under its names.

    ``config.json`` records the parametrization as ``_flow_*``, so that weights are not read with another one. Raises
    ``ValueError`` if both ``architecture`` and ``pretrained`` are given.

    Attributes:
        context_width_key: of the text features' width in the model's configuration; none if it reads no text.
    """

    context_width_key: str = ""

    def __init__(
        self, architecture: object, pretrained: object, prediction: Prediction | None, time_scale: float
    ) -> None:
        super().__init__()
        one = architecture is None or pretrained is None
        require(self, one, "give `architecture` or `pretrained`, not both; the weights say the size")
        self.prediction = prediction or PredictVelocity()
        self.time_scale = time_scale

    @property
    @abstractmethod
    def diffusers_model(self) -> Any:
        """The model of diffusers."""

    @property
    def model_channels(self) -> int:
        """C of the latents that the model takes, by its configuration."""
        return int(self.diffusers_model.config.in_channels)

    @property
    def parametrization(self) -> dict[str, str | float]:
        return super().parametrization | {"time_scale": self.time_scale}

    def timestep(self, t: Tensor) -> Tensor:
        """The model's time input for ``t`` ``[B]``, fp32."""
        assert t.dtype in (torch.float32, torch.float64)
        return self.prediction.time(t) * self.time_scale

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes ``config.json`` and safetensors in diffusers' format; ``pretrained=directory`` reads them back."""
        self.diffusers_model.save_pretrained(str(directory))

    def enable_gradient_checkpointing(self) -> None:
        """Keeps no activations inside the blocks from now on."""
        self.diffusers_model.enable_gradient_checkpointing()
        self.gradient_checkpointing = True

    def _recorded(self) -> dict[str, Any]:
        """The parametrization in ``config.json``; None for the settings that it does not record."""
        config = self.diffusers_model.config
        return {name: config.get(f"_flow_{name}") for name in self.parametrization}

    def _record(self) -> None:
        """Puts the parametrization into the configuration that ``save_pretrained`` writes."""
        settings = {f"_flow_{name}": value for name, value in self.parametrization.items()}
        self.diffusers_model.register_to_config(**settings)

    def _check_agreement(self, weights: PretrainedWeights, recorded: dict[str, Any]) -> None:
        """Compares this network's settings with those that ``weights`` were trained with, and records them."""
        config = self.diffusers_model.config
        for name, ours, theirs in (
            ("latent channels", self.latent_channels, self.model_channels),
            ("text feature width", self.context_width, config.get(self.context_width_key, self.context_width)),
            *((name, value, recorded[name] or value) for name, value in self.parametrization.items()),
        ):
            difference = f"{weights} was trained with {name} {theirs!r}, this experiment has {ours!r}"
            remedy = "make the data, encoder or net settings agree, or start from other weights"
            require(self, ours == theirs, f"{difference}; {remedy}")
        self._record()
