"""Settings of optimisers and schedulers that a resumed training takes from its configuration.

A checkpoint's optimiser state holds the settings that it was saved with, and torch's ``load_state_dict`` puts them in
the place of those that the configuration has now: a new learning rate would have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import Trainer

GROUP_SETTINGS = ("weight_decay", "momentum", "betas", "eps")
"""Settings of an optimiser's parameter group beside its rate. Optimisers keep state of their own in groups, too."""

SCHEDULE_SETTINGS = (
    *("T_max", "eta_min", "gamma", "step_size", "milestones", "_milestones"),
    *("total_iters", "start_factor", "end_factor", "factor", "power"),
)
"""Settings of torch's schedulers beside the base rates; the rest of their state is their progress."""


class ConfiguredSettings:
    """The settings of a trainer's optimisers and schedulers as the configuration has built them."""

    def __init__(self, trainer: Trainer) -> None:
        self._groups = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self._schedules = [dict(vars(scheduler)) for scheduler in _schedulers(trainer)]

    def __bool__(self) -> bool:
        return bool(self._groups)

    def put_back(self, trainer: Trainer) -> Sequence[str]:
        """Gives what was loaded these settings again; returns what has changed, as ``lr 0.001 -> 1e-06``.

        A rate that a scheduler has changed keeps its share of the base rate.
        """
        changes: dict[str, None] = {}

        def differs(name: str, loaded: Any, ours: Any) -> bool:
            if loaded == ours:
                return False
            changes[f"{name} {_short(loaded)} -> {_short(ours)}"] = None
            return True

        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, ours in zip(optimizer.param_groups, groups, strict=True):
                base = "initial_lr" if "initial_lr" in ours else "lr"
                loaded = group.get(base)
                if loaded and differs("lr", loaded, ours[base]):
                    group["lr"] = group["lr"] * (ours[base] / loaded) if base == "initial_lr" else ours["lr"]
                    group[base] = ours[base]
                for name in GROUP_SETTINGS:
                    if name in ours and name in group and differs(name, _listed(group[name]), _listed(ours[name])):
                        group[name] = ours[name]
        for scheduler, ours in zip(_schedulers(trainer), self._schedules, strict=True):
            if "base_lrs" in ours and scheduler.base_lrs != ours["base_lrs"]:
                scheduler.base_lrs = ours["base_lrs"]
                scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
            for name in SCHEDULE_SETTINGS:
                if name in ours and differs(name.lstrip("_"), getattr(scheduler, name), ours[name]):
                    setattr(scheduler, name, ours[name])
        return list(changes)


def _schedulers(trainer: Trainer) -> Iterator[Any]:
    """All schedulers, those within another one too."""
    waiting: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    while waiting:
        scheduler = waiting.pop(0)
        yield scheduler
        waiting += getattr(scheduler, "_schedulers", [])


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
