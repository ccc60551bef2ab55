"""Weightings: from squared errors to losses."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from emf_lightning.flow.times import Times


class Weighting(ABC):
    """Base of the weightings."""

    @abstractmethod
    def __call__(self, squared_error: Tensor, times: Times) -> Tensor:
        """Per-sample losses ``[B]``, from squared errors ``[B]``, summed over dimensions, and the samples' (r, t)."""


class UniformWeighting(Weighting):
    """The squared error itself, unweighted: MeanFlow as the EMF paper writes it.

    Example:
        >>> from emf_lightning.flow.times import Times
        >>> times = Times(torch.zeros(2), torch.ones(2), n_interval=2)
        >>> UniformWeighting()(torch.tensor([1.0, 3.0]), times)
        tensor([1., 3.])
    """

    def __call__(self, squared_error: Tensor, times: Times) -> Tensor:
        """The squared error itself."""
        return squared_error


class AdaptiveWeighting(Weighting):
    """w = 1 / sg(D + c)^p of a sample's summed squared error D (arXiv 2505.13447, eq. 22).

    With p = 1 the loss stays near 1 while the network learns: read the raw mean squared errors instead.

    Args:
        p: 0 is no weighting, 1 the papers' default; -1 has the gradient of D^2 / 2 (arXiv 2512.13006).
        c: positive, in units of the sum over all dimensions.

    Example:
        >>> from emf_lightning.flow.times import Times
        >>> times = Times(torch.zeros(2), torch.ones(2), n_interval=2)
        >>> AdaptiveWeighting(p=1.0, c=1.0)(torch.tensor([1.0, 3.0]), times)
        tensor([0.5000, 0.7500])
    """

    def __init__(self, p: float = 1.0, c: float = 1e-3) -> None:
        if c <= 0:
            raise ValueError(f"AdaptiveWeighting: c must be positive, got {c}")
        self.p = p
        self.c = c

    def __call__(self, squared_error: Tensor, times: Times) -> Tensor:
        """D / sg(D + c)^p; the weight carries no gradient."""
        return squared_error / (squared_error.detach() + self.c) ** self.p


class AnyStepWeighting(AdaptiveWeighting):
    """The adaptive weight times 1 + tan(.4 pi (1 - (t - r))): short intervals count more (arXiv 2512.05150).

    The factor falls from 4.08 at r = t to 1 for one step. At p = 1/2 the adaptive loss is a root mean square error: the
    release's metric, with c = 1e-6 times the number of dimensions.

    Args:
        p: see ``AdaptiveWeighting``.
        c: see ``AdaptiveWeighting``.

    Example:
        >>> from emf_lightning.flow.times import Times
        >>> times = Times(r=torch.tensor([0.0, 0.5]), t=torch.tensor([1.0, 0.5]), n_interval=1)
        >>> AnyStepWeighting(p=0.0)(torch.ones(2), times)  # one step, and r = t
        tensor([1.0000, 4.0777])
    """

    def __init__(self, p: float = 0.5, c: float = 1e-3) -> None:
        super().__init__(p, c)

    def __call__(self, squared_error: Tensor, times: Times) -> Tensor:
        """Adaptive losses times the factor."""
        return (1 + torch.tan(0.4 * torch.pi * (1 - (times.t - times.r)))) * super().__call__(squared_error, times)


class TransitionWeighting(AdaptiveWeighting):
    """The adaptive weight times (tan t - tan r + sigma_d)^(-1/2): long intervals count less (arXiv 2509.04394).

    The tangent is that of t itself, in radians, as the release takes it for the linear path: tan 1 = 1.56, so t = 1
    needs no guard. Samples with r = t have a factor of 1.

    Args:
        sigma_data: sigma_d > 0, the data's standard deviation; the release's 1 makes the factor continuous at r = t.
        p: see ``AdaptiveWeighting``; 1 in the release.
        c: see ``AdaptiveWeighting``; 1e-5 of the mean over dimensions in the release.

    Example:
        >>> from emf_lightning.flow.times import Times
        >>> times = Times(r=torch.tensor([0.0, 0.5]), t=torch.tensor([1.0, 0.5]), n_interval=1)
        >>> TransitionWeighting(p=0.0)(torch.ones(2), times)  # the longest interval, and r = t
        tensor([0.6253, 1.0000])
    """

    def __init__(self, sigma_data: float = 1.0, p: float = 1.0, c: float = 1e-3) -> None:
        super().__init__(p, c)
        if sigma_data <= 0:
            raise ValueError(f"TransitionWeighting: sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def __call__(self, squared_error: Tensor, times: Times) -> Tensor:
        """Adaptive losses times the factor, which is between .62 and 1 at sigma_d = 1."""
        factor = torch.rsqrt(torch.tan(times.t) - torch.tan(times.r) + self.sigma_data)
        factor[times.n_interval :] = 1
        return factor * super().__call__(squared_error, times)
