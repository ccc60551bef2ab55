"""The check of du/dt in ``SelfCheck``, by a statistic over samples."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.derivative.base import Derivative
from emf_lightning.flow.derivative.float64 import KeepFloat64, central_difference
from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.path import interpolate
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.sharding import is_sharded
from emf_lightning.text.base import TextFeatures

SAMPLES = 16
"""Samples over which the median of the errors is taken: du/dt of single samples nearly cancels or has sharp bends, and
bf16 then leaves errors above 1. docs/results/self_check.md has the distributions behind the bounds."""

R, T = 0.3, 0.7
"""Interval of the checked derivative; bf16 cannot represent these times."""

FLOAT64_STEPS = (1e-6, 1e-5, 1e-4)
FLOAT64_TOLERANCE = 3e-3
"""Measured: below 1e-7 at 1e-6; 1e-3 at 1e-4 for a network with fp32 parts that KeepFloat64 does not reach; above 1e-2
where one branch of one block lost its tangent."""

FP32_STEPS = (1e-2, 1e-3, 1e-4, 1e-5)
"""Measured in fp32: 4e-4 at 1e-3 with a time scale of 1, 1e-3 at 1e-4 with a time scale of 1000."""

_OF_SAMPLES = f"in the median of {SAMPLES} samples"


class FaultError(Exception):
    """A failed check on one rank."""


@dataclass(frozen=True)
class Point:
    """Some samples: the states z, the velocities v and the texts at which u is evaluated."""

    z: Tensor
    v: Tensor
    text: TextFeatures

    def times(self, r: float, t: float) -> tuple[Tensor, Tensor]:
        return self.z.new_full((len(self.z),), r), self.z.new_full((len(self.z),), t)

    def double(self) -> Point:
        return Point(self.z.double(), self.v.double(), self.text.to(dtype=torch.float64))


@dataclass(frozen=True)
class Float64:
    """du/dt in float64 at each point, and each sample's error of it.

    Attributes:
        values: by forward mode.
        network: error of forward mode against finite differences.
        method: error of u and du/dt by the training's derivative against the network's; None if it approximates.
    """

    values: list[Tensor]
    network: Tensor
    method: Tensor | None


def points_of(batch: CaptionImageBatch, samples: int = SAMPLES) -> list[Point]:
    """The first samples, each with its own noise; a small batch's several times. What is not finite in them is 0.

    Training leaves such samples out, and a run must not depend on which samples come first.

    At most an eighth of the batch is evaluated at once: float64 then takes no more memory than a training step.
    """
    index = torch.arange(samples, device=batch.latents.device) % len(batch)
    x, text = torch.nan_to_num(batch.latents[index].float(), 0, 0, 0), batch.text[index].finite_or(batch.null)[0]
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(x.device)
    z, v = interpolate(x, e, x.new_full((samples,), T)), e - x
    size = max(1, len(batch) // 8)
    parts = [slice(first, first + size) for first in range(0, samples, size)]
    return [Point(z[part], v[part], text[part]) for part in parts]


def check_derivative(
    module: FlowMapModule, points: Sequence[Point], precision: str, tolerance: float, largest_copy: int
) -> str:
    """Compares du/dt with float64, or with fp32 differences for a network that is not copied.

    Returns:
        The result, for ``SelfCheck``'s message.

    Raises:
        FaultError: for an error beyond its bound.
    """
    name, weights = f"{type(module.derivative).__name__}, {precision}", list(module.net.parameters())
    trained = derivative_in_training(module, points)
    if not is_sharded(module.net) and sum(p.numel() for p in weights) <= largest_copy:
        exact = derivative_in_float64(module, points)
        apart = _check_float64(exact, type(module.derivative).__name__)
        error, reference = _median(map(errors, trained, exact.values)), "its float64 value"
        figure = f"du/dt {error:.0e} of float64 ({name}; forward mode {apart:.0e} of differences)"
    elif all(p.dtype == torch.float32 for p in weights):
        with torch.autocast(points[0].z.device.type, enabled=False):
            error = _median(
                _errors_of_differences(value, module.average_velocity(point.text), point, FP32_STEPS)
                for value, point in zip(trained, points, strict=True)
            )
        reference, figure = "finite differences in fp32", f"du/dt {error:.0e} of fp32 differences ({name})"
    else:
        return "du/dt not checked (neither a float64 copy nor fp32 weights)"
    if error > tolerance:
        raise FaultError(
            f"du/dt as training takes it ({name}) is {error:.1e} of itself away from {reference}, {_OF_SAMPLES}, more "
            f"than the tolerance {tolerance}: set the derivative's precision to fp32, take ForwardMode or another step "
            "of FiniteDifference, or lower net.time_scale"
        )
    return figure


def derivative_in_training(module: FlowMapModule, points: Sequence[Point]) -> list[Tensor]:
    """du/dt of the live network by the training's derivative, in the precision of the surrounding context."""
    assert module.derivative is not None
    return [_derivative(module.derivative, module.average_velocity(point.text), point)[1] for point in points]


def derivative_in_float64(module: FlowMapModule, points: Sequence[Point]) -> Float64:
    """du/dt of a float64 copy of the network, by forward mode, by differences and by the training's derivative."""
    assert module.derivative is not None
    net, method = copy.deepcopy(module.net).double(), copy.copy(module.derivative)
    method.precision = "training"
    values, network, by_method = [], [], []
    with torch.autocast(points[0].z.device.type, enabled=False), KeepFloat64():
        for point in map(Point.double, points):
            r, t = point.times(R, T)
            u = module.average_velocity(point.text, net)
            values.append(ForwardMode().jvp(u, point.z, r, t, point.v))
            network.append(_errors_of_differences(values[-1], u, point, FLOAT64_STEPS, enough=FLOAT64_TOLERANCE / 2))
            if method.exact:
                value, dudt = _derivative(method, u, point)
                by_method.append(torch.maximum(errors(value, u(point.z, r, t)), errors(dudt, values[-1])))
    return Float64(values, torch.cat(network), torch.cat(by_method) if method.exact else None)


def _check_float64(exact: Float64, method: str) -> float:
    """The error of forward mode."""
    error = _median([exact.network])
    if error > FLOAT64_TOLERANCE:
        raise FaultError(
            f"du/dt by forward mode is {error:.1e} of itself away from finite differences, in float64, {_OF_SAMPLES}, "
            f"more than {FLOAT64_TOLERANCE}: a tangent is lost or wrong between (z, r, t) and u. Look in the network "
            "for .detach(), .item(), .data or numpy on what depends on z or t, for an autograd.Function with a wrong "
            "jvp, for times rounded below fp32, and for t - r taken outside the network's call"
        )
    if exact.method is not None and (off := _median([exact.method])) > FLOAT64_TOLERANCE:
        raise FaultError(
            f"u or du/dt by {method} is {off:.1e} of itself away from the network's, in float64, {_OF_SAMPLES}, more "
            f"than {FLOAT64_TOLERANCE}: it must be that of the u that it is given, along (v, 0, 1) of (z, r, t), with "
            "every tangent and times that are not rounded; a derivative that approximates says so: exact = False"
        )
    return error


def errors(value: Tensor, reference: Tensor) -> Tensor:
    """Each sample's |value - reference| / |reference|; infinite where either is not finite."""
    value, reference = value.double().flatten(1), reference.double().flatten(1)
    relative = (value - reference).norm(dim=1) / reference.norm(dim=1).clamp(min=1e-30)
    return relative.nan_to_num(nan=torch.inf)


def _derivative(method: Derivative, u: AverageVelocity, point: Point) -> tuple[Tensor, Tensor]:
    """u and du/dt by ``method``."""
    return method(u, point.z, *point.times(R, T), point.v, len(point.z))


def _errors_of_differences(
    value: Tensor, u: AverageVelocity, point: Point, steps: Sequence[float], enough: float = 0.0
) -> Tensor:
    """Each sample's error of ``value`` against finite differences at the best of several step sizes.

    Steps after one where all errors are below ``enough`` are left out; a sharded network takes all.
    """
    r, t = point.times(R, T)
    best = point.z.new_full((len(point.z),), torch.inf, dtype=torch.float64)
    for step in steps:
        best = torch.minimum(best, errors(value, central_difference(u, point.z, r, t, point.v, step)))
        if (best < enough).all():
            break
    return best


def _median(parts: Iterable[Tensor]) -> float:
    return float(torch.cat(list(parts)).median())
