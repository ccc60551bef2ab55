"""Checks at the start of training: the derivative, the network's time inputs, equal gradients on all ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from emf_lightning.callbacks.experiment_progress_bar import show_line
from emf_lightning.callbacks.sampling.all_gather import all_gather_list
from emf_lightning.callbacks.sampling.sampling_context import sampling_context
from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.flow.derivative.float64 import KeepFloat64, central_difference
from emf_lightning.flow.derivative.forward_mode import ForwardMode
from emf_lightning.flow.path import interpolate
from emf_lightning.flow.velocity import AverageVelocity
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.sharding import is_sharded
from emf_lightning.text.base import TextFeatures

R, T = 0.3, 0.7
"""Interval of the checked derivative; bf16 cannot represent these times."""

TIME_STEP = 5e-4
"""A step from t = .5 that bf16 rounds away at time scales from 1 to 1000."""

FLOAT64_STEPS = (1e-6, 1e-5, 1e-4)
FLOAT64_TOLERANCE = 1e-2
"""Measured: at most 4e-6 at 1e-6; 1e-3 at 1e-4 for a network with fp32 parts that KeepFloat64 does not reach."""

FP32_STEPS = (1e-2, 1e-3, 1e-4, 1e-5)
"""Measured in fp32: 4e-4 at 1e-3 with a time scale of 1, 1e-3 at 1e-4 with a time scale of 1000."""


class SelfCheck(Callback):
    """Checks the derivative, the network at r = t and that all ranks have equal gradients; logs the result in one line.

    On the first batch's first sample, with the live weights, it checks that

    - u changes with small steps in t, and with r;
    - du/dt by forward mode agrees with finite differences, on a float64 copy of the network;
    - du/dt by the training's own derivative and precision agrees with that float64 value;
    - an anchored network at r = t is the flow that it was made from.

    At the first optimiser step it compares the gradients of all ranks. The copy is deleted before training begins. A
    network that is sharded or has more than ``largest_copy`` parameters is compared with finite differences in fp32
    instead, if its weights are fp32. Weights, gradients and random states do not change.

    Args:
        tolerance: largest relative error of the training's du/dt. bf16 leaves 5e-3 to 4e-2, fp32 4e-7 to 1e-5.
        largest_copy: largest number of parameters that are copied to float64, at 8 bytes each on the network's device.

    Raises:
        ValueError: on the first batch or at the first optimiser step, where a check fails.
    """

    def __init__(self, tolerance: float = 0.25, largest_copy: int = 500_000_000) -> None:
        if tolerance <= 0:
            raise ValueError(f"SelfCheck: tolerance must be positive, got {tolerance}")
        self.tolerance = tolerance
        self.largest_copy = largest_copy
        self._started = self._finished = False
        self._figures: list[str] = []

    @property
    def message(self) -> str:
        """The result of all checks, complete after the first optimiser step."""
        return "self-check: " + ", ".join(self._figures)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = self._finished = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._started or not isinstance(pl_module, FlowMapModule):
            return
        self._started = True
        fault = None
        with sampling_context(trainer, pl_module, averaged=False):
            try:
                self._figures = self._check(pl_module, batch, str(trainer.precision))
            except _FaultError as error:
                fault = str(error)
        for found in all_gather_list(trainer, [fault]):  # all ranks raise, else the others would wait
            if found is not None:
                raise ValueError(f"SelfCheck: {found}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._finished or not self._started:
            return
        self._finished = True
        if trainer.world_size > 1:
            parameters = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]
            self._figures.append(_compare_gradients(trainer, parameters))
        if self._figures and trainer.is_global_zero:
            show_line(trainer, self.message)

    def _check(self, module: FlowMapModule, batch: CaptionImageBatch, precision: str) -> list[str]:
        """Results of the checks, for the message.

        Raises:
            _FaultError: for the first failed check. Checks whose outcome depends on the samples come last, so that
                ranks that share a sharded network call it equally often.
        """
        x = batch.latents[:1].float()
        e = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(x.device)
        point = _Point(interpolate(x, e, x.new_full((1,), T)), e - x, batch.text[:1])
        figures = _flow_at_r_equals_t(module, point)
        if module.derivative is not None:
            _check_times(module, point)
            r, t = point.times(R, T)
            trained = module.derivative(module.average_velocity(point.text), point.z, r, t, point.v, 1)[1]
            name = f"{type(module.derivative).__name__}, {precision}"
            figures.insert(0, self._compare_derivative(module, point, trained, name))
        return figures

    def _compare_derivative(self, module: FlowMapModule, point: _Point, trained: Tensor, name: str) -> str:
        """Compares ``trained`` with du/dt in float64, or with fp32 differences for a network that is not copied."""
        weights = list(module.net.parameters())
        if not is_sharded(module.net) and sum(p.numel() for p in weights) <= self.largest_copy:
            exact, apart = _in_float64(module, point)
            if not apart <= FLOAT64_TOLERANCE:
                raise _FaultError(
                    f"du/dt by forward mode is {apart:.1e} of itself away from finite differences, in float64: a "
                    "tangent is lost or wrong between (z, r, t) and u. Look in the network for .detach(), .item(), "
                    ".data or numpy on what depends on z or t, for an autograd.Function with a wrong jvp, for times "
                    "rounded below fp32, and for t - r taken outside the network's call"
                )
            error, reference = _error(trained, exact), "its float64 value"
            figure = f"du/dt {error:.0e} of float64 ({name}; forward mode {apart:.0e} of differences)"
        elif all(p.dtype == torch.float32 for p in weights):
            with torch.autocast(point.z.device.type, enabled=False):
                error = _error_of_differences(trained, module.average_velocity(point.text), point, FP32_STEPS)
            reference, figure = "finite differences in fp32", f"du/dt {error:.0e} of fp32 differences ({name})"
        else:
            return "du/dt not checked (neither a float64 copy nor fp32 weights)"
        if error > self.tolerance:
            raise _FaultError(
                f"du/dt as training takes it ({name}) is {error:.1e} of itself away from {reference}, more than the "
                f"tolerance {self.tolerance}: set the derivative's precision to fp32, take ForwardMode or another step "
                "of FiniteDifference, or lower net.time_scale"
            )
        return figure


class _FaultError(Exception):
    """A failed check on one rank."""


@dataclass(frozen=True)
class _Point:
    """One sample: the state z, the velocity v and the text at which u is evaluated."""

    z: Tensor
    v: Tensor
    text: TextFeatures

    def times(self, r: float, t: float) -> tuple[Tensor, Tensor]:
        return self.z.new_full((1,), r), self.z.new_full((1,), t)

    def double(self) -> _Point:
        return _Point(self.z.double(), self.v.double(), self.text.to(dtype=torch.float64))


def _flow_at_r_equals_t(module: FlowMapModule, point: _Point) -> list[str]:
    u = module.average_velocity(point.text)
    r, t = point.times(T, T)
    value = u(point.z, r, t)
    if not value.isfinite().all():
        raise _FaultError("u(z, t, t) is not finite before the first step: check the weights that training starts from")
    from emf_lightning.networks.two_time.embedding import without_interval  # imports diffusers

    with without_interval(module.net) as anchored:
        if not anchored:
            return []
        apart = _error(value, u(point.z, r, t))
    if apart > 1e-3:
        raise _FaultError(
            f"u(z, t, t) is {apart:.1e} away from the flow that the network was made from: its interval embedding must "
            "add nothing at r = t; measure it from length 0, as AnchoredInterval in networks.two_time does"
        )
    return ["r = t exact" if apart == 0 else f"r = t within {apart:.0e} of its flow"]


def _check_times(module: FlowMapModule, point: _Point) -> None:
    u = module.average_velocity(point.text)
    r, t = point.times(0.25, 0.5)
    with torch.autocast(point.z.device.type, enabled=False):
        value, later, longer = u(point.z, r, t), u(point.z, r, t + TIME_STEP), u(point.z, torch.zeros_like(r), t)
    if torch.equal(value, later):
        raise _FaultError(
            f"the network does not notice a step of {TIME_STEP} in t: its times are rounded, probably to "
            "bf16, and du/dt is then noise. Keep r and t in fp32 up to the sinusoids: no .to(dtype) on them inside the "
            "network, and cast_forward_inputs=False in a sharding strategy's mixed-precision policy"
        )
    if torch.equal(value, longer):
        raise _FaultError(
            "u(z, r, t) does not change with r: the network ignores the interval. Its time embedding must take t - r "
            "(networks.two_time); where the interval's embedding starts at zero on purpose, leave SelfCheck out of "
            "trainer.callbacks"
        )


def _in_float64(module: FlowMapModule, point: _Point) -> tuple[Tensor, float]:
    """du/dt by forward mode in float64, and its error against finite differences."""
    net, point = copy.deepcopy(module.net).double(), point.double()
    r, t = point.times(R, T)
    u = module.average_velocity(point.text, net)
    with torch.autocast(point.z.device.type, enabled=False), KeepFloat64():
        exact = ForwardMode().jvp(u, point.z, r, t, point.v)
        return exact, _error_of_differences(exact, u, point, FLOAT64_STEPS)


def _error_of_differences(value: Tensor, u: AverageVelocity, point: _Point, steps: Sequence[float]) -> float:
    """Error of ``value`` against finite differences at the best of several step sizes."""
    r, t = point.times(R, T)
    return min(_error(value, central_difference(u, point.z, r, t, point.v, step)) for step in steps)


def _error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|; infinite where either is not finite."""
    value, reference = value.double(), reference.double()
    error = float((value - reference).norm() / reference.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def _compare_gradients(trainer: Trainer, parameters: Sequence[tuple[str, nn.Parameter]]) -> str:
    """Result of the comparison, for the message.

    Raises:
        ValueError: where a rank has other gradients than rank 0, or the network is sharded over some of the ranks only.
    """
    meshes = [p.device_mesh.size() for _, p in parameters if isinstance(p, DTensor)]
    if any(size < trainer.world_size for size in meshes):
        raise ValueError(
            f"SelfCheck: the network is sharded over {min(meshes)} of {trainer.world_size} ranks, and each such group "
            "trains for itself: give ModelParallelStrategy data_parallel_size: devices x num_nodes and "
            "tensor_parallel_size: 1 (auto takes the devices of a node for tensor ranks)"
        )
    if meshes:
        return "gradients not compared (sharded: each rank has its own part)"
    first, *others = all_gather_list(trainer, [torch.stack([_checksum(p) for _, p in parameters]).cpu()])
    for rank, theirs in enumerate(others, start=1):
        largest_norm = torch.maximum(first[:, 1:].abs(), theirs[:, 1:].abs())
        differs = ((first - theirs).abs() > 1e-5 * largest_norm).any(1)  # never where a sum is not finite
        if apart := [name for (name, _), wrong in zip(parameters, differs, strict=True) if wrong]:
            raise ValueError(
                f"SelfCheck: after the first backward pass rank {rank} has other gradients than rank 0 in {len(apart)} "
                f"of {len(parameters)} parameters, {apart[0]} among them: each rank trains its own network. Call the "
                "network inside training_step, through the strategy; wrap it in nothing that hides its parameters; "
                "let every rank use the same ones"
            )
    return f"gradients equal on {trainer.world_size} ranks"


def _checksum(parameter: nn.Parameter) -> Tensor:
    """Sum and norm of the gradient, ``[2]``, float64; -1 twice where there is none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.tensor([-1.0, -1.0], dtype=torch.float64, device=parameter.device)
    gradient = gradient.double() if gradient.device.type != "mps" else gradient.float()
    return torch.stack([gradient.sum(), gradient.norm()]).double()
