"""Base of the flow maps on diffusers' models: loading, saving and recorded parametrization."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from emf_lightning.networks.adapter import Adapter, merge
from emf_lightning.networks.adapter_files import SavedAdapter, fingerprint_of, save_adapter
from emf_lightning.networks.architecture_checks import require
from emf_lightning.networks.base import FlowMapNetwork, describe
from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.prediction import Prediction, PredictVelocity
from emf_lightning.networks.two_time.rules import IntervalInput
from emf_lightning.networks.two_time.two_time_embedding import INTERVAL, TimePlaces
from emf_lightning.pretrained.loading import PretrainedWeights, on_meta_device


class DiffusersFlowMap(FlowMapNetwork):
    """A flow map on a model of diffusers, saved in its format, under its names.

    ``config.json`` records the parametrization as ``_flow_*``, so that weights are not read with another one. Raises
    ``ValueError`` if both ``architecture`` and ``pretrained`` are given.

    Attributes:
        context_width_key: of the text features' width in the model's configuration; none if it reads no text.
        places: where the model keeps its time embedding.
        published_time_scale: of weights whose configuration does not say it.
        lora_prefix: the model's name in its pipeline, with which the keys of adapters begin.
        interval: the rule that joins r and t; None for a network with one time.
        adapter: the settings of adapters, if it has some.
        parent: the weights under them.
        parent_fingerprint: a digest of these.
    """

    context_width_key: str = ""
    places: ClassVar[TimePlaces]
    published_time_scale: ClassVar[float] = 1000.0
    lora_prefix: ClassVar[str] = "transformer"
    interval: IntervalInput | None
    adapter: Adapter | None = None
    parent: PretrainedWeights | None = None
    parent_fingerprint = ""
    _start: tuple[Any, PretrainedWeights] | None = None
    _saved: SavedAdapter | None = None
    _refitted = False
    _kept: Sequence[str] = ()

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
        settings = super().parametrization | {"time_scale": self.time_scale}
        if self.adapter is not None:
            settings |= {"adapter": describe(self.adapter), "parent_fingerprint": self.parent_fingerprint}
        return settings

    @property
    def new_parts(self) -> Sequence[str]:
        """Paths of the model's submodules that the class of diffusers does not have."""
        path = f"{self.places.embedding}.{INTERVAL}"
        return [path] if any(name == path for name, _ in self.diffusers_model.named_modules()) else []

    @property
    def unused_parts(self) -> Sequence[str]:
        """Paths of the model's submodules that do not affect the output, and so do not train."""
        return ()

    def timestep(self, t: Tensor) -> Tensor:
        """The model's time input for ``t`` ``[B]``, fp32."""
        assert t.dtype in (torch.float32, torch.float64)
        return self.prediction.time(t) * self.time_scale

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes ``config.json`` and safetensors in diffusers' format; ``pretrained=directory`` reads them back.

        Of a network with adapters these hold what trained alone, and name the parent.
        """
        if self.adapter is None or self.parent is None:
            self.diffusers_model.save_pretrained(str(directory))
            return
        about = self.adapter, self.parent, self.parent_fingerprint
        save_adapter(self.diffusers_model, self.lora_prefix, Path(directory), *about, kept=self._kept)

    def merge_adapters(self) -> None:
        """Adds the adapters to the parent's weights, in place: it is a whole network then."""
        merge(self.diffusers_model)
        self.adapter, self.parent, self.parent_weights = None, None, frozenset()

    def enable_gradient_checkpointing(self) -> None:
        """Keeps no activations inside the blocks from now on."""
        self.diffusers_model.enable_gradient_checkpointing()
        self.gradient_checkpointing = True

    def _parent_of(
        self, pretrained: str | PretrainedWeights | None, adapter: Adapter | None, finetuning: Finetuning
    ) -> PretrainedWeights | None:
        """The weights to load: ``pretrained``, or where these are adapters alone, their parent's.

        Raises:
            ValueError: for adapters without weights or with settings that contradict them.
        """
        if pretrained is None:
            rule = "adapter trains beside frozen weights; give them as net.init_args.pretrained"
            require(self, adapter is None, rule)
            return None
        weights = PretrainedWeights.of(pretrained)
        saved = self._saved = SavedAdapter.at(weights)
        if saved is not None:
            rule = f"{weights} holds {saved.adapter}, this experiment has {adapter}"
            same = adapter is None or adapter == saved.adapter
            require(self, same, f"{rule}; make them agree, or leave adapter out to go on with these")
        if saved is None and adapter is None:
            return weights
        for name in ("trainable", "reset_text_projection", "reset_time"):
            rule = f"finetuning.{name} changes weights that stay frozen under adapters; leave out one of the two"
            require(self, not getattr(finetuning, name), rule)
        self._start = (adapter, weights) if saved is None else (saved.adapter, saved.parent)
        # planning reads configurations alone, and the folder has the parent's
        return weights if on_meta_device() else self._start[1]

    def _as_saved(self) -> None:
        """Gives a parent that was loaded for saved adapters the parametrization that these were trained with."""
        if self._saved is not None:
            self.diffusers_model.register_to_config(**self._saved.recorded)

    def _adapt(self) -> None:
        """Freezes the model and adds the adapters, where there are some; the parts that it lacked before train."""
        if self._start is None:
            return
        self.adapter, self.parent = self._start
        model = self.diffusers_model
        self.adapter.inject(model, self.new_parts, self.unused_parts)
        kept = {name for name, each in model.named_parameters() if each.requires_grad}
        if self._refitted:
            kept |= {name for name, _ in model.named_parameters() if name.startswith(f"{self.places.embedding}.")}
        if self._saved is not None and not on_meta_device():
            kept |= self._saved.load(model, self.lora_prefix)
        parents = {name: each for name, each in model.named_parameters() if name not in kept}
        self.parent_fingerprint = fingerprint_of(parents)
        same = self._saved is None or self.parent_fingerprint in ("", self._saved.fingerprint)
        rule = f"{self._saved and self._saved.weights} was trained on other weights than those at {self.parent}"
        require(self, same, f"{rule} now; give the folder its parent again")
        prefix = next(name for name, part in self.named_modules() if part is model)
        self._kept = sorted(kept)
        self.parent_weights = frozenset(self.state_dict()) - {f"{prefix}.{name}" for name in kept}

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
        rule = "the time embedding under adapters is the parent's and cannot be fitted anew"
        require(self, not self.parent_weights, f"{rule}; merge them first (emf export --merge)")
        self._refitted = True
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
        if self.interval is not None and recorded["interval"] is None:
            self.is_parent = self.interval.preserves_parent
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
