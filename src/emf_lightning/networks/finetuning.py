"""Settings of a start from pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from emf_lightning.networks.two_time.two_time_embedding import NEGATIVE


@dataclass(frozen=True)
class Finetuning:
    """Changes to a network before it is trained on.

    Attributes:
        refit: fit the time embedding anew if the pretrained weights know another ``time_scale`` (1000, if their
            configuration does not say); it takes some seconds. Without it EMF's network has to learn t from scratch.
        trainable: prefixes of the names of the parameters that train; null for all. EMF's are
            ``[transformer_blocks, time_embed, scale_shift_table]``.
        reset_text_projection: initialise the text projection anew, for text features of another width than the
            weights know.
        reset_time: standard deviation of normal weights that the time embeddings, of t and of the interval, start from
            (EMF's code: .02); biases are 0. At r = t the network is then not its parent. None keeps the pretrained one.
    """

    refit: bool = False
    trainable: list[str] | None = None
    reset_text_projection: bool = False
    reset_time: float | None = None

    def __post_init__(self) -> None:
        if self.reset_time is None:
            return
        if self.refit:
            raise ValueError("Finetuning: refit keeps the time embedding that reset_time draws anew; set one of them")
        if not self.reset_time > 0:
            raise ValueError(f"Finetuning: reset_time must be positive, got {self.reset_time}")

    @torch.no_grad()
    def draw_time(self, embedding: nn.Module) -> None:
        """Draws the linear layers of a time embedding, and of the interval's inside it, anew, where that is asked."""
        if self.reset_time is None:
            return
        for name, layer in embedding.named_modules():
            if isinstance(layer, nn.Linear) and name.partition(".")[0] not in ("conditions", NEGATIVE):
                nn.init.normal_(layer.weight, std=self.reset_time)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def freeze(self, caller: str, model: nn.Module) -> None:
        """Freezes the parameters of ``model`` that are not ``trainable``; ValueError if a prefix fits no parameter."""
        if self.trainable is None:
            return
        names = [f"{name}." for name, _ in model.named_parameters()]
        prefixes = tuple(f"{prefix}." for prefix in self.trainable)
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name in names):
                raise ValueError(
                    f"{caller}: trainable={prefix[:-1]!r} is the beginning of no parameter's name; there are "
                    f"{', '.join(dict.fromkeys(name.partition('.')[0] for name in names))}"
                )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f"{name}.".startswith(prefixes))
