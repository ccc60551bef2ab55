"""LoRA adapters on a frozen network, by peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from emf_lightning.networks.architecture_checks import require
from emf_lightning.networks.base import FlowMapNetwork

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Projections of attention in all of diffusers' models: of the image's tokens, and of the text's."""


@dataclass(frozen=True)
class Adapter:
    """LoRA: a layer W x becomes W x + alpha / rank B A x, and A and B train in place of W. There is no dropout.

    Dropout would give u and du/dt other weights at each call.

    Attributes:
        rank: rows of A, columns of B.
        alpha: null for rank, a factor of 1. Tools that read no metadata (ComfyUI) take that one.
        target_modules: names, or ends of names, of linear layers and convolutions; null for all projections of
            attention.
    """

    rank: int = 16
    alpha: float | None = None
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        require(self, self.rank >= 1, f"rank must be at least 1, got {self.rank}")
        require(self, self.alpha is None or self.alpha > 0, f"alpha must be positive, got {self.alpha}")
        rule = "target_modules is empty; name layers, or leave it out for the projections of attention"
        require(self, self.target_modules is None or len(self.target_modules) > 0, rule)

    def inject(self, model: nn.Module, new: Sequence[str], unused: Sequence[str]) -> None:
        """Freezes ``model``, its submodules ``new`` excepted, and puts adapters into its other layers, in place.

        At the start they have no effect, since B is 0.

        Args:
            model: of diffusers.
            new: paths of submodules that train as they are.
            unused: paths of submodules that do not affect the output: DDP would wait for their gradients.

        Raises:
            ValueError: for a target that fits no other layer, or one that peft cannot adapt.
        """
        from peft import LoraConfig, inject_adapter_in_model

        targets = self._targets(model, (*new, *unused))
        model.requires_grad_(False)
        try:
            inject_adapter_in_model(LoraConfig(r=self.rank, lora_alpha=self._alpha, target_modules=targets), model)
        except (ValueError, NotImplementedError) as error:  # e.g. a rank that does not divide into a layer's groups
            raise ValueError(f"Adapter: peft cannot adapt target_modules={self.target_modules} ({error})") from error
        for name in new:
            model.get_submodule(name).requires_grad_(True)

    @property
    def _alpha(self) -> Any:
        return self.rank if self.alpha is None else self.alpha

    def _targets(self, model: nn.Module, others: Sequence[str]) -> list[str]:
        """Whole names of the layers that ``target_modules`` names, outside the submodules ``others``."""
        own = tuple(f"{name}." for name in others)
        layers = [
            name
            for name, layer in model.named_modules()
            if type(layer) in (nn.Linear, nn.Conv2d) and not f"{name}.".startswith(own)
        ]
        wanted = self.target_modules or [each for each in ATTENTION if _named(layers, each)]
        rule = f"{type(model).__name__} has no projections of attention; name layers in adapter.target_modules"
        require(self, bool(wanted), rule)
        for each in wanted:
            names = list(dict.fromkeys(_end(layer, each.count(".")) for layer in layers))
            near = get_close_matches(each, names, n=3, cutoff=0.4) or sorted(names)[:8]
            rule = f"target_modules: {each!r} ends the name of no linear layer or convolution of the frozen"
            require(
                self, bool(_named(layers, each)), f"{rule} {type(model).__name__}; near names are {', '.join(near)}"
            )
        return [layer for layer in layers if any(_named([layer], each) for each in wanted)]


def _named(layers: Sequence[str], end: str) -> list[str]:
    return [layer for layer in layers if f".{layer}".endswith(f".{end}")]


def _end(layer: str, dots: int) -> str:
    """The last parts of a name, one more than ``dots``, or two where the last is a number."""
    parts = layer.split(".")
    return ".".join(parts[-max(dots + 1, 1 + parts[-1].isdigit()) :])


def merge(model: Any) -> None:
    """Adds the adapters to the weights of their layers, and takes them out, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            place, _, own = name.rpartition(".")
            setattr(model.get_submodule(place), own, layer.get_base_layer())
    del model.peft_config


def parent_names(module: nn.Module) -> set[str]:
    """Names in the state dict of ``module`` of the weights that its networks' parents hold already."""
    networks = [(name, part) for name, part in module.named_modules() if isinstance(part, FlowMapNetwork)]
    return {f"{prefix}.{name}".lstrip(".") for prefix, net in networks for name in net.parent_weights}


def parent_parameters(module: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters under adapters, by identity: as the memo of a deep copy it shares them with the original."""
    networks = [part for part in module.modules() if isinstance(part, FlowMapNetwork)]
    named = ((name, each, net) for net in networks for name, each in net.named_parameters())
    return {id(each): each for name, each, net in named if name in net.parent_weights}
