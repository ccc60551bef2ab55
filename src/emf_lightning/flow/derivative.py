"""The total derivative of the average velocity along the path, MeanFlow's one hard quantity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from emf_lightning.flow.path import Velocity


def total_derivative(u: Velocity, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """u(z, r, t) and du/dt = (grad_z u) v + d_t u, by forward mode (arXiv 2505.13447, eq. 8).

    The tangent of the primals (z, r, t) is (v, 0, 1). No graph is recorded, so the memory is that of two forward
    passes. Attention runs on the one kernel that has a forward-mode rule, inside this function only.

    Args:
        u: the average velocity; it must take t - r itself, so that the derivative moves the interval's length too.
        z: ``[N, C, H, W]``, the state at t.
        r: ``[N]``, fp32.
        t: ``[N]``, fp32.
        v: like ``z``, dz/dt.

    Returns:
        u and du/dt, both like ``z``, detached.
    """
    assert r.dtype == t.dtype == torch.float32 or t.dtype == torch.float64, "times are rounded: t - r would be noise"
    torch.clear_autocast_cache()  # weights cast under no_grad must not be re-used by the forward that needs gradients
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        value, dudt = torch.func.jvp(lambda z_, t_: u(z_, r, t_), (z, t), (v, torch.ones_like(t)))[:2]
    return value, dudt
