"""Checks of network sizes, made before a library fails in the middle of a forward pass."""

from __future__ import annotations


def require(owner: object, condition: bool, rule: str) -> None:
    """Raises ``ValueError`` with ``rule``, behind the class of ``owner``, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{type(owner).__name__}: {rule}")


def require_positive(owner: object, *names: str) -> None:
    """Raises ``ValueError`` unless each of these attributes of ``owner`` is at least 1."""
    for name in names:
        require(owner, getattr(owner, name) >= 1, f"{name} must be at least 1, got {getattr(owner, name)}")


def require_position_width(owner: object, heads: int, head_dim: int) -> None:
    """Raises ``ValueError`` unless the width heads x head_dim has room for sines and cosines of two coordinates."""
    rule = "the width num_attention_heads x attention_head_dim must be a multiple of 4 for sine-cosine positions, got"
    require(owner, heads * head_dim % 4 == 0, f"{rule} {heads} x {head_dim} = {heads * head_dim}")


def require_patches(
    owner: object, latent_size: int, patch_size: int, remedy: str = "change the data's resolution"
) -> None:
    """Raises ``ValueError`` unless latents of side ``latent_size`` divide into patches of ``patch_size``."""
    rule = f"latents of side {latent_size} do not divide into patches of {patch_size}; {remedy}"
    require(owner, latent_size % patch_size == 0, rule)


def require_pooled(owner: object, pooled: int, context_width: int) -> None:
    """Raises ``ValueError`` unless pooled text features of ``pooled`` channels fit into a token of the text's."""
    rule = f"pooled_projection_dim={pooled} must be at most the text features' width {context_width}"
    require(owner, pooled <= context_width, f"{rule}: their first token holds the pooled features")
