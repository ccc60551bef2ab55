"""Flow maps on any diffusers backbone, with one time input or two."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from emf_lightning.networks.adapter import Adapter
from emf_lightning.networks.architecture_checks import require
from emf_lightning.networks.base import describe
from emf_lightning.networks.diffusers_flow_map import DiffusersFlowMap
from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.prediction import Prediction
from emf_lightning.networks.two_time.rules import IntervalInput
from emf_lightning.networks.two_time.two_time_embedding import INTERVAL, TwoTimeEmbedding
from emf_lightning.pretrained.files import tensors_of
from emf_lightning.pretrained.loading import PretrainedWeights, load_pretrained, on_meta_device


class BackboneFlowMap(DiffusersFlowMap):
    """Base of flow maps on a backbone of diffusers, which knows one time, t.

    Without ``interval`` u(z, r, t) is the same for every r: flow matching, FGM and SCFlow need no more. With one the
    backbone gets a second time embedding, and MeanFlow and its relatives train it.

    A subclass says where the model keeps its time (``places``) and its ``blocks``, and calls it (``call``).

    Args:
        kind: diffusers' class.
        size: its arguments for a model from scratch.
        architecture: the settings that ``size`` was made from; None if they are the default ones.
        pretrained: the weights to start from instead, in diffusers' format: a local folder or hub name, or
            ``PretrainedWeights`` for a model inside a pipeline's repository.
        finetuning: changes before training, and the parameters that train.
        adapter: LoRA on the frozen network, which trains beside what the pretrained one lacked.
        prediction: rule from the backbone's output to u.
        time_scale: factor on t before the backbone's time embedding; by default that of published weights.
        interval: rule that joins r and t, e.g. ``AnchoredInterval``; None for a network with one time.
        gradient_checkpointing: keep no activations inside the blocks and compute them again in the backward pass.
        compile: let torch compile the blocks, which takes a minute or more at the start.
        latent_channels: C of the latents.
        latent_size: H = W of the latents.
        context_width: D of the text features.

    Raises:
        ValueError: if pretrained weights cannot be loaded or disagree with the data.
    """

    two_times: TwoTimeEmbedding | None
    takes_interval = False

    def __init__(
        self,
        kind: Any,
        size: dict[str, Any],
        architecture: object | None,
        latent_channels: int,
        latent_size: int,
        context_width: int,
        *,
        pretrained: str | PretrainedWeights | None = None,
        finetuning: Finetuning | None = None,
        adapter: Adapter | None = None,
        prediction: Prediction | None = None,
        time_scale: float | None = None,
        interval: IntervalInput | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(architecture, pretrained, prediction, time_scale or self.published_time_scale)
        finetuning = finetuning or Finetuning()
        for name in ("reset_text_projection", "reset_time"):
            require(self, not getattr(finetuning, name), f"finetuning.{name} is for SanaFlowMap alone")
        self.latent_channels, self.latent_size, self.context_width = latent_channels, latent_size, context_width
        self.interval = interval
        self.takes_interval = interval is not None
        weights = self._parent_of(pretrained, adapter, finetuning)
        if weights is None:
            self.model = kind(**size)
            self._add_interval()
            self._record()
        else:
            self.model = load_pretrained(
                type(self).__name__, kind, weights, frozen=False, surplus=(f"{self.places.embedding}.{INTERVAL}.",)
            )
            self._as_saved()
            recorded = self._recorded()
            if finetuning.refit:
                self._refit_to_ours(weights, recorded)
            self._add_interval()
            self._check_agreement(weights, recorded)
            self._load_interval(weights)
        finetuning.freeze(type(self).__name__, self.model)
        for part in self.unused_parts:  # DDP would wait for their gradients
            self.model.get_submodule(part).requires_grad_(False)
        self._adapt()
        if gradient_checkpointing:
            self.enable_gradient_checkpointing()
        if compile:
            self.compile_blocks()

    @property
    def diffusers_model(self) -> Any:
        return self.model

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated parts in the order in which they run."""

    @property
    def parametrization(self) -> dict[str, str | float]:
        """The prediction, the time scale, and the rule that joins r and t, if there is one."""
        rule = {} if self.interval is None else {"interval": describe(self.interval)}
        return super().parametrization | rule

    @abstractmethod
    def call(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The model's output at one time, with its inputs as its own pipeline makes them."""

    def backbone(
        self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        """The model's output; t - r is taken in fp32 inside the time embedding, after scaling."""
        at = nullcontext() if self.two_times is None else self.two_times.at(self.timestep(r), self.timestep(t))
        with at:
            return self.call(z.to(self.model.dtype), t, context.to(self.model.dtype), mask)

    def refit_time(self, time_scale: float) -> float:
        """Fits the time embedding anew for inputs ``time_scale`` t (``two_time.refit``); returns its error.

        The network forgets its intervals; one that starts from it may have any rule for them.
        """
        old_scale, self.time_scale = self.time_scale, time_scale
        error = self._refit(old_scale)
        if self.interval is not None:
            embedding = self.model.get_submodule(self.places.embedding)
            if self.interval.embeds_length:
                delattr(embedding, INTERVAL)
            if self.two_times is not None:
                self.two_times.remove()
            self.interval = self.two_times = None
            self.takes_interval = False
        self._record()
        self.model.register_to_config(_flow_interval=None)
        return error

    def _add_interval(self) -> None:
        rule = self.interval
        self.two_times = (
            None if rule is None else TwoTimeEmbedding(self.model, self.places, rule, self.blocks, self.time_scale)
        )

    def _load_interval(self, weights: PretrainedWeights) -> None:
        """The second time embedding's weights, where the network knew intervals; otherwise it stays a copy of t's."""
        prefix = f"{self.places.embedding}.{INTERVAL}."
        rule, remedy = self.diffusers_model.config.get("_flow_interval"), "set net.init_args.interval"
        known = self.interval is not None or not rule  # a rule by blocks has no weights of its own
        require(self, known, f"{weights} knows intervals; {remedy} to {rule}")
        if on_meta_device():
            return
        read = tensors_of(weights.path, prefix, subfolder=weights.subfolder, stem="diffusion_pytorch_model")
        ours = None if self.interval is None or not self.interval.embeds_length else self._interval_embedding()
        require(self, not read or ours is not None, f"{weights} knows intervals; {remedy}")
        if ours is not None and read:
            ours.load_state_dict(read)

    def _interval_embedding(self) -> nn.Module:
        return self.model.get_submodule(f"{self.places.embedding}.{INTERVAL}")


def patches(z: Tensor, size: int) -> Tensor:
    """``[B, N, C size size]``, the patches of latents ``[B, C, H, W]``, row by row, channels first in each."""
    return nn.functional.pixel_unshuffle(z, size).flatten(2).transpose(1, 2)


def unpatched(tokens: Tensor, height: int, size: int) -> Tensor:
    """The latents ``[B, C, H, W]`` of ``patches``, with ``height`` rows of patches."""
    return nn.functional.pixel_shuffle(torch.unflatten(tokens.transpose(1, 2), 2, (height, -1)), size)
