"""Checks at the start of training: the derivative, the network's time inputs, equal gradients on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from emf_lightning.callbacks.derivative_check import FaultError, Point, T, check_derivative, errors, points_of
from emf_lightning.callbacks.experiment_progress_bar import show_line
from emf_lightning.callbacks.sampling.all_gather import all_gather_list
from emf_lightning.callbacks.sampling.sampling_context import sampling_context
from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.networks.two_time.two_time_embedding import without_interval

TIME_STEP = 5e-4
"""A step from t = .5 that bf16 rounds away at time scales from 1 to 1000."""


class SelfCheck(Callback):
    """Checks the derivative, the network at r = t and that all ranks have equal gradients; logs the result in one line.

    On samples of the first batch, with the live weights, it checks that

    - u changes with small steps in t, and with r;
    - du/dt by forward mode agrees with finite differences, on a float64 copy of the network;
    - u and du/dt by the training's own derivative, on that copy, are the same, if the derivative is exact;
    - du/dt by the training's own derivative and precision agrees with that float64 value;
    - an anchored network at r = t is the flow that it was made from.

    Errors of du/dt are medians over 16 samples of |error| / |du/dt|.

    At the first optimiser step it compares the gradients of all ranks. The copy is deleted before training begins. A
    network that is sharded or has more than ``largest_copy`` parameters is compared with finite differences in fp32
    instead, if its weights are fp32. Weights, gradients and random states do not change.

    Args:
        tolerance: largest error of the training's du/dt in its precision. bf16 leaves 5e-3 to 1e-1, fp32 4e-7 to 1e-5.
        largest_copy: largest number of parameters that are copied to float64, at 8 bytes each on the network's device.

    Raises:
        ValueError: on the first batch or at the first optimiser step, where a check fails.
    """

    def __init__(self, tolerance: float = 0.25, largest_copy: int = 500_000_000) -> None:
        if tolerance <= 0:
            raise ValueError(f"SelfCheck: tolerance must be positive, got {tolerance}")
        self.tolerance = tolerance
        self.largest_copy = largest_copy
        self._started = False
        self._figures: list[str] = []
        self._compared: list[Optimizer] = []

    @property
    def message(self) -> str:
        """The result of all checks, complete after the first optimiser step."""
        return "self-check: " + ", ".join(self._figures)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = False
        self._compared.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._started or not isinstance(pl_module, FlowMapModule):
            return
        self._started = True
        fault = None
        with sampling_context(trainer, pl_module, averaged=False):
            try:
                self._figures = self._check(pl_module, batch, str(trainer.precision))
            except FaultError as error:
                fault = str(error)
        for found in all_gather_list(trainer, [fault]):  # all ranks raise, else the others would wait
            if found is not None:
                raise ValueError(f"SelfCheck: {found}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._started or optimizer in self._compared:
            return
        self._compared.append(optimizer)
        of_network = optimizer is trainer.optimizers[0]  # of several in a step it is the last one
        if trainer.world_size > 1:
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            parameters = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad and id(p) in own]
            figure = _compare_gradients(trainer, parameters)
            self._figures += [figure] if of_network else []
        if of_network and self._figures and trainer.is_global_zero:
            show_line(trainer, self.message)

    def _check(self, module: FlowMapModule, batch: CaptionImageBatch, precision: str) -> list[str]:
        """Results of the checks, for the message.

        Raises:
            FaultError: of the first check that fails, after all checks: ranks that share a sharded network call it
                equally often.
        """
        points = points_of(batch)
        checks: list[Callable[[], list[str]]] = [lambda: _flow_at_r_equals_t(module, points[0])]
        if module.derivative is not None:
            settings = precision, self.tolerance, self.largest_copy
            checks += [
                lambda: _check_times(module, points[0]),
                lambda: [check_derivative(module, points, *settings)],
            ]
        figures: list[str] = []
        faults: list[FaultError] = []
        for check in checks:
            try:
                figures = check() + figures
            except FaultError as error:
                faults.append(error)
        if faults:
            raise faults[0]
        return figures


def _flow_at_r_equals_t(module: FlowMapModule, point: Point) -> list[str]:
    u = module.average_velocity(point.text)
    r, t = point.times(T, T)
    value = u(point.z, r, t)
    with without_interval(module.net) as anchored:
        apart = float(errors(value, u(point.z, r, t)).max()) if anchored else None
    if not value.isfinite().all():
        raise FaultError("u(z, t, t) is not finite before the first step: check the weights that training starts from")
    if apart is None:
        return []
    if apart > 1e-3:
        raise FaultError(
            f"u(z, t, t) is {apart:.1e} away from the flow that the network was made from: its interval embedding must "
            "add nothing at r = t; measure it from length 0, as AnchoredInterval in networks.two_time does"
        )
    return ["r = t exact" if apart == 0 else f"r = t within {apart:.0e} of its flow"]


def _check_times(module: FlowMapModule, point: Point) -> list[str]:
    u = module.average_velocity(point.text)
    r, t = point.times(0.25, 0.5)
    with torch.autocast(point.z.device.type, enabled=False):
        value, later, longer = u(point.z, r, t), u(point.z, r, t + TIME_STEP), u(point.z, torch.zeros_like(r), t)
    if torch.equal(value, later):
        raise FaultError(
            f"the network does not notice a step of {TIME_STEP} in t: its times are rounded, probably to "
            "bf16, and du/dt is then noise. Keep r and t in fp32 up to the sinusoids: no .to(dtype) on them inside the "
            "network, and cast_forward_inputs=False in a sharding strategy's mixed-precision policy"
        )
    if torch.equal(value, longer):
        raise FaultError(
            "u(z, r, t) does not change with r: the network ignores the interval. Its time embedding must take t - r "
            "(networks.two_time); where the interval's embedding starts at zero on purpose, leave SelfCheck out of "
            "trainer.callbacks"
        )
    return []


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
