"""Checks of network sizes, made before a library fails in the middle of a forward pass."""

from __future__ import annotations


def check_positive(settings: object, *names: str) -> None:
    """Raises ``ValueError`` unless each of these attributes of ``settings`` is at least 1."""
    for name in names:
        if (value := getattr(settings, name)) < 1:
            raise ValueError(f"{type(settings).__name__}: {name} must be at least 1, got {value}")


def check_dropout(settings: object, dropout: float) -> None:
    """Raises ``ValueError`` unless ``dropout`` lies in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"{type(settings).__name__}: dropout must lie in [0, 1), got {dropout}")


def check_position_width(settings: object, heads: int, head_dim: int) -> None:
    """Raises ``ValueError`` unless the width heads x head_dim has room for sines and cosines of two coordinates."""
    if heads * head_dim % 4:
        raise ValueError(
            f"{type(settings).__name__}: the width num_attention_heads x attention_head_dim must be a multiple of 4 "
            f"for sine-cosine positions, got {heads} x {head_dim} = {heads * head_dim}"
        )


def check_patches(owner: object, latent_size: int, patch_size: int, remedy: str) -> None:
    """Raises ``ValueError`` unless latents of side ``latent_size`` divide into patches of ``patch_size``."""
    if latent_size % patch_size:
        raise ValueError(
            f"{type(owner).__name__}: latents of side {latent_size} do not divide into patches of {patch_size}; "
            f"{remedy}"
        )
