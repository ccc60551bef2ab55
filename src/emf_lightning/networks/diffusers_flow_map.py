"""Base of the flow maps on diffusers' models: loading, saving and recorded parametrization."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from emf_lightning.networks.architecture_checks import require
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.prediction import Prediction, PredictVelocity
from emf_lightning.networks.two_time.two_time_embedding import TimePlaces
from emf_lightning.pretrained.loading import PretrainedWeights


class DiffusersFlowMap(FlowMapNetwork):
    """A flow map on a model of diffusers, saved in its format, under its names.

    ``config.json`` records the parametrization as ``_flow_*``, so that weights are not read with another one. Raises
    ``ValueError`` if both ``architecture`` and ``pretrained`` are given.

    Attributes:
        context_width_key: of the text features' width in the model's configuration; none if it reads no text.
        places: where the model keeps its time embedding.
        published_time_scale: of weights whose configuration does not say it.
    """

    context_width_key: str = ""
    places: ClassVar[TimePlaces]
    published_time_scale: ClassVar[float] = 1000.0

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

    def _refit_to_ours(self, weights: PretrainedWeights, recorded: dict[str, Any]) -> None:
        """Fits the time embedding of ``weights`` anew for ``time_scale``, where they know another one."""
        scale = recorded["time_scale"] or self.published_time_scale
        if scale != self.time_scale:
            rule = f"{weights} knows intervals at time_scale {scale:g}, which refit would make it forget"
            knows = self.diffusers_model.config.get("_flow_interval")
            require(self, not knows, f"{rule}; leave refit out and set that time_scale")
            self._refit(scale)
            recorded["time_scale"] = None

    def _refit(self, old_scale: float) -> float:
        """Fits the model's time embedding, trained on ``old_scale`` t, anew for ``time_scale`` t."""
        from emf_lightning.networks.two_time.refit import refit

        model = self.diffusers_model
        if model.device.type == "meta":
            return 0.0
        embedding: Any = model.get_submodule(self.places.embedding)
        if self.places.sinusoid is None:  # adaLN-single
            parts = embedding.emb.timestep_embedder, embedding.emb.time_proj
            modulation = lambda embedded: embedding.linear(embedding.silu(embedded))  # noqa: E731
            return refit(*parts, old_scale, self.time_scale, modulation)
        return refit(embedding, model.get_submodule(self.places.sinusoid), old_scale, self.time_scale)

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
