"""Cache of latents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emf_lightning.data.cache.entry_cache import EntryCache
from emf_lightning.latents.base import Autoencoder
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.fingerprint import fingerprint, weights_digest

_INTERNAL = frozenset(vars(nn.Module()))
"""Attributes of every module."""


class LatentCache(EntryCache[Tensor]):
    """Latents that any process has computed before, by autoencoder, image transform and image file.

    Images whose latents are cached are not decoded. For the arguments see ``EntryCache``; a channel of the latents is
    stored as a token.
    """

    def open(self, autoencoder: Autoencoder, side: int, transform: str) -> None:
        """Binds the cache to latents ``[C, side, side]`` of images after ``transform``."""
        self._side = side
        name = fingerprint(autoencoder=autoencoder_fingerprint(autoencoder), transform=transform)
        self._open(name, autoencoder.channels, side * side)

    def to_tokens(self, values: Tensor) -> tuple[Tensor, Tensor]:
        tokens = values.flatten(2)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=values.device)

    def from_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens.view(*tokens.shape[:2], self._side, self._side)


def autoencoder_fingerprint(autoencoder: Autoencoder) -> str:
    """Digest of everything that the latents depend on: class, plain settings, configurations, weights."""
    settings, configurations = {}, {}
    for name, value in vars(autoencoder).items():
        if isinstance(value, (bool, int, float, str, torch.dtype)) and not name.startswith("_") and name != "training":
            settings[name] = str(value)
    if not _of_library(autoencoder):  # ours are told apart without these
        settings |= {"class": f"{type(autoencoder).__module__}.{type(autoencoder).__qualname__}"}
        settings |= _own_settings(autoencoder)
    if isinstance(autoencoder, Pixels):
        settings["offset"] = settings.pop("shift")  # the name in existing caches
    for name, part in autoencoder.named_modules():
        config = getattr(part, "config", None)
        if isinstance(config, Mapping):  # diffusers' models; private entries name the folder that they come from
            configurations[name] = {key: str(value) for key, value in config.items() if not key.startswith("_")}
    return fingerprint(
        autoencoder=type(autoencoder).__name__,
        settings=settings,
        configurations=configurations,
        weights=weights_digest(autoencoder),
    )


def _own_settings(autoencoder: Autoencoder) -> dict[str, str]:
    """Plain values and tensors among the attributes of an own class, and of own classes within it."""
    found = {}
    for path, part in autoencoder.named_modules():
        for name, value in vars(part).items() if not _of_library(part) else ():
            if name == "training" or name in _INTERNAL:
                continue
            if isinstance(value, Tensor):
                found[f"{path}.{name}"] = hashlib.sha256(str(value.detach().cpu().tolist()).encode()).hexdigest()
            elif _is_plain(value):
                found[f"{path}.{name}"] = str(value)
    return found


def _of_library(part: nn.Module) -> bool:
    """Whether the class is this package's, or of a library whose configurations and weights say all."""
    return type(part).__module__.partition(".")[0] in ("emf_lightning", "torch", "diffusers", "transformers")


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is a number, a text or None, or holds such alone: its text is then the same in each process."""
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
