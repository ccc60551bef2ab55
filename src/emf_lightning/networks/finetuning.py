"""Settings of a start from pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


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
    """

    refit: bool = False
    trainable: list[str] | None = None
    reset_text_projection: bool = False

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
