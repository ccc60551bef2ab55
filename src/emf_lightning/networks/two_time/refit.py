"""A time embedding fitted anew at another scale of its times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_SMOOTHEST, _STEEPEST, _RIDGE = 2.0, 16.0, 1e-4
"""Slopes of the steps of ``refit``, per unit of t, and its ridge relative to the kernel's diagonal.

On the parent of the shapes experiments, 100 t to t: 5 % error, du/dt 14 % smaller in the mean and at most 30 %.
"""


@torch.no_grad()
def refit(
    embedder: Any,
    sinusoid: nn.Module,
    old_scale: float,
    new_scale: float,
    modulation: Callable[[Tensor], Tensor] = lambda embedding: embedding,
) -> float:
    """Fits the ``embedder`` of a ``sinusoid``, trained on ``old_scale`` t, anew for later inputs ``new_scale`` t.

    A network trained on 1000 t holds high frequencies in t that do not affect flow matching; MeanFlow's du/dt
    multiplies them. Fitting the embedding anew at a small scale keeps its values and makes its derivative smooth
    (arXiv 2511.23342 reports the same step as crucial). No data are needed: its first layer becomes smooth steps spread
    over t, its second the ridge regression of the old values on them. Returns the root mean square error of the
    ``modulation`` that the network makes of the embedding, relative to its standard deviation over t.
    """
    generator = torch.Generator().manual_seed(0)
    dtype, device = embedder.linear_1.weight.dtype, embedder.linear_1.weight.device
    grid = torch.linspace(0, 1, 1025, device=device)
    target = embedder.forward(sinusoid(grid * old_scale).to(dtype))

    # t as a combination of the sines and cosines, so that a step can have any place and width
    waves = _with_ones(sinusoid(grid * new_scale).double().cpu())
    *of_waves, constant = torch.linalg.lstsq(waves, grid[:, None].double().cpu(), rcond=1e-6, driver="gelsd").solution
    units = embedder.linear_1.out_features
    steepness = _SMOOTHEST * (_STEEPEST / _SMOOTHEST) ** torch.rand(units, generator=generator, dtype=torch.float64)
    steepness = torch.where(torch.rand(units, generator=generator) < 0.5, -steepness, steepness)
    place = 1.2 * torch.rand(units, generator=generator, dtype=torch.float64) - 0.1
    embedder.linear_1.weight.copy_(steepness[:, None] * torch.cat(of_waves))
    embedder.linear_1.bias.copy_(steepness * (constant - place))

    steps = _with_ones(embedder.act(embedder.linear_1(waves[:, :-1].to(device, dtype))).double().cpu())
    kernel = steps @ steps.T
    kernel.diagonal().add_(_RIDGE * kernel.diagonal().mean())
    solution = steps.T @ torch.linalg.solve(kernel, target.double().cpu())
    embedder.linear_2.weight.copy_(solution[:-1].T)
    embedder.linear_2.bias.copy_(solution[-1])

    old, new = modulation(target), modulation(embedder.forward(sinusoid(grid * new_scale).to(dtype)))
    return float((new - old).square().mean(0).sum().sqrt() / old.std(0).norm())


def _with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
