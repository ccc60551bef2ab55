"""Error and du/dt by the interval's length t - r, and the derivative's share of the training time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from emf_lightning.flow.objectives.base import FlowMapTerms
from emf_lightning.modules.flow_map import FlowMapModule


class DerivativeMonitor(Callback):
    """Logs error, du/dt and the cosine of u and v by the interval's length t - r, and du/dt's share of the time.

    Sums run on the device, over all batches and ranks since the last logging step; only a logging step waits for the
    device. The weighted loss says little (with adaptive weighting it stays about 1): read the error by length instead.
    One-step sampling uses lengths near 1 alone.

    Args:
        edges: edges of the bins of t - r, rising from 0 to 1.
        time_every_n_steps: every n-th batch is timed: on CUDA by events, without waiting for the device. The share is
            that of the time between the batch's start and end. List this callback before those that sample, so that
            the time leaves out sampling.
    """

    def __init__(self, edges: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), time_every_n_steps: int = 10) -> None:
        if len(edges) < 2 or list(edges) != sorted(set(edges)) or edges[0] != 0 or edges[-1] != 1:
            raise ValueError(f"DerivativeMonitor: edges must rise from 0 to 1, got {list(edges)}")
        if time_every_n_steps < 1:
            raise ValueError(f"DerivativeMonitor: time_every_n_steps must be at least 1, got {time_every_n_steps}")
        self.edges = tuple(edges)
        self.labels = [f"{low:g}-{high:g}" for low, high in pairwise(edges)]  # of the bins: last part of the tags
        self.time_every_n_steps = time_every_n_steps
        self._sums: Tensor | None = None
        self._inner_edges: Tensor | None = None
        self._timers: list[_BatchTimer] = []
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums = self._inner_edges = None
        self._step = trainer.global_step
        self._timers.clear()
        names = ("mse", "derivative", "cosine")  # a chart of each in TensorBoard's custom scalars, a curve for each bin
        charts = {name: ["Multiline", [f"^train/{name}_by_length/{label}$" for label in self.labels]] for name in names}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars({"by the interval's length t - r": charts})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        derivative = pl_module.derivative if isinstance(pl_module, FlowMapModule) else None
        if derivative is not None and batch_idx % self.time_every_n_steps == 0:
            derivative.timer = _BatchTimer(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not isinstance(pl_module, FlowMapModule):
            return
        derivative = pl_module.derivative
        if derivative is not None and isinstance(derivative.timer, _BatchTimer):
            derivative.timer.stop()
            self._timers.append(derivative.timer)
            derivative.timer = nullcontext()
        if pl_module.last_terms is None:
            return
        sums = self._bin_sums(pl_module.last_terms)
        self._sums = sums if self._sums is None else self._sums + sums
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if stepped and interval and trainer.global_step % interval == 0:
            self._publish(trainer, pl_module)

    def _bin_sums(self, terms: FlowMapTerms) -> Tensor:
        """Sums over a batch by bin, ``[6, bins + 1]``; the last bin holds the samples with r = t.

        The six sums are: samples, finite samples, squared errors, squared norms of du/dt, samples whose du/dt is
        finite, cosines of u and v.
        """
        times, bins = terms.times, len(self.edges) - 1
        if self._inner_edges is None:  # kept: copying a tensor to the device waits for it
            self._inner_edges = torch.tensor(self.edges[1:-1], device=times.t.device)
        bin_of = torch.bucketize(times.t - times.r, self._inner_edges)
        bin_of[times.n_interval :] = bins
        member = (bin_of[:, None] == torch.arange(bins + 1, device=bin_of.device)).float()
        without_derivative = len(bin_of) - len(terms.derivative_norm)  # the last samples
        norm = nn.functional.pad(terms.derivative_norm, (0, without_derivative), value=float("nan"))
        quantities = [
            torch.ones_like(norm),
            terms.finite,
            torch.where(terms.finite, terms.squared_error, 0),
            torch.where(norm.isfinite(), norm.square(), 0),
            norm.isfinite(),
            torch.where(terms.finite, terms.cosine, 0),
        ]
        return torch.stack([quantity.float() for quantity in quantities]) @ member

    def _publish(self, trainer: Trainer, module: FlowMapModule) -> None:
        assert self._sums is not None
        sums = trainer.strategy.reduce(self._sums, reduce_op="sum")
        self._sums = None
        assert isinstance(sums, Tensor)
        labels = [f"_by_length/{label}" for label in self.labels] + ["_r_equals_t"]
        values: dict[str, float] = {}
        for label, (samples, finite, error, squares, taken, cosine) in zip(labels, sums.T.tolist(), strict=True):
            if label.startswith("_by") and samples:
                values[f"nan_rows{label}"] = samples - finite
            if label.startswith("_by") and finite:  # the module itself logs the error at r = t
                values[f"mse{label}"] = error / finite
            if taken:
                values[f"derivative{label}"] = (squares / taken) ** 0.5
            if finite:
                values[f"cosine{label}"] = cosine / finite
        shares = [timer.share for timer in self._timers if timer.inside]  # sums.tolist() has waited for the device
        self._timers.clear()
        if shares:
            values["derivative_share"] = sum(shares) / len(shares)
        module.log_dict({f"train/{name}": value for name, value in values.items()})


class _BatchTimer:
    """Time of one batch and, as a context, of the derivative in it, without waiting for the device.

    Attributes:
        inside: start and end of each pass of the derivative; empty where it is fused with the pass of u.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.inside: list[tuple[Any, Any]] = []
        self._began = self._mark()
        self._ended: Any = None

    def __enter__(self) -> None:
        self._entered = self._mark()

    def __exit__(self, *_: object) -> None:
        self.inside.append((self._entered, self._mark()))

    def stop(self) -> None:
        self._ended = self._mark()

    @property
    def share(self) -> float:
        """Share of the batch's time that the derivative took; the device must have finished the batch."""
        inside = sum(self._between(a, b) for a, b in self.inside)
        return inside / max(self._between(self._began, self._ended), 1e-9)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, a: Any, b: Any) -> float:
        return float(a.elapsed_time(b)) if self._cuda else b - a
