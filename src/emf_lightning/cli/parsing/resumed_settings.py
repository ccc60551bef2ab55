"""Settings of optimisers and schedulers that a resumed training takes from its configuration.

A checkpoint's optimiser state holds the settings that it was saved with, and torch's ``load_state_dict`` puts them in
the place of those that the configuration has now: a new learning rate would have no effect.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

GROUP_SETTINGS = ("weight_decay", "momentum", "betas", "eps")
"""Settings of an optimiser's parameter group beside its rate and its class's arguments.

Optimisers keep state of their own in groups, too, which is no argument.
"""

CYCLED = ("momentum", "betas")
"""Those of them that a scheduler with ``cycle_momentum`` changes."""

RATE_BOUNDS = ("max_lr", "min_lr", "max_momentum", "base_momentum")
"""Bounds in a group between which schedulers move."""

GROUP_RATES = ("lr", "initial_lr", *RATE_BOUNDS)
"""Numbers in a group from which schedulers start."""

SCHEDULE_SETTINGS = (
    *("T_max", "T_0", "T_mult", "eta_min", "gamma", "step_size", "milestones", "_milestones", "total_steps"),
    *("_schedule_phases", "total_iters", "start_factor", "end_factor", "factor", "power"),
    *("max_lrs", "total_size", "step_ratio", "_anneal_func_type"),
)
"""Settings of torch's schedulers beside their class's arguments; the rest of their state is their progress."""

STRUCTURE = ("amsgrad", "centered", "fused", "foreach", "capturable", "differentiable")
"""Arguments of optimisers on which the form of their state depends: a resumed one keeps them."""

_NO_SETTINGS = ("optimizer", "last_epoch", "_schedulers")
"""Arguments of schedulers that are attributes, too, and are no settings."""


class ConfiguredSettings:
    """The settings of a trainer's optimisers and schedulers as the configuration has built them."""

    def __init__(self, trainer: Trainer) -> None:
        self._groups = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        # schedulers with the same optimiser, which a copy must not copy
        self._schedulers = {
            id(config): copy.deepcopy(config.scheduler, {id(optimizer): optimizer for optimizer in trainer.optimizers})
            for config in trainer.lr_scheduler_configs
        }

    def __bool__(self) -> bool:
        return bool(self._groups)

    def put_back(self, trainer: Trainer) -> Sequence[str]:
        """Gives what was loaded these settings again; returns what has changed, as ``lr 0.001 -> 1e-06``.

        A scheduler with other settings than the loaded one's takes the steps that were taken anew, from its start.
        """
        changes: list[str] = []
        configs = {id(config.scheduler.optimizer): config for config in trainer.lr_scheduler_configs}
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            config = configs.get(id(optimizer))
            ours: Any = None if config is None else self._schedulers[id(config)]
            loaded: Any = None if config is None else config.scheduler
            kept = CYCLED if getattr(ours, "cycle_momentum", False) else ()
            for group, wanted in zip(optimizer.param_groups, groups, strict=True):
                for name in {**dict.fromkeys(GROUP_SETTINGS), **_arguments(optimizer)}:
                    if name in wanted and name in group and name not in (*kept, *GROUP_RATES, *STRUCTURE):
                        changes += _change(name, group[name], wanted[name])
                        group[name] = wanted[name]
            base = "lr" if ours is None else "initial_lr"
            rates = [
                line
                for group, wanted in zip(optimizer.param_groups, groups, strict=True)
                for name in (base, *RATE_BOUNDS)
                if name in group and name in wanted
                for line in _change("lr" if name == base else name, group[name], wanted[name])
            ]
            if ours is not None:
                rates += _differences(loaded, ours)
            if rates:
                changes += rates
                _start(optimizer, groups)
            if rates and config is not None:
                config.scheduler = ours
                _advance(ours, loaded.last_epoch)
        return list(dict.fromkeys(changes))


def _arguments(part: Any) -> dict[str, None]:
    """Names of the arguments that the class of an optimiser or a scheduler takes."""
    return dict.fromkeys(inspect.signature(type(part)).parameters)


def _change(name: str, loaded: Any, ours: Any) -> list[str]:
    loaded, ours = (list(value) if isinstance(value, tuple) else value for value in (loaded, ours))
    return [] if loaded == ours else [f"{name} {_short(loaded)} -> {_short(ours)}"]


def _differences(loaded: Any, ours: Any) -> list[str]:
    """Settings of a scheduler, and of those within it, that were loaded and are not ours."""
    if not isinstance(loaded, type(ours)) or vars(loaded).keys() != vars(ours).keys():
        return [f"scheduler {type(ours).__name__}"]
    arguments = [form for name in _arguments(ours) for form in (name, f"_{name}")]
    found = [
        line
        for name in dict.fromkeys([*SCHEDULE_SETTINGS, *arguments])
        if name in vars(ours) and name not in _NO_SETTINGS
        for line in _change(name.lstrip("_"), getattr(loaded, name), getattr(ours, name))
    ]
    inner = [getattr(each, "_schedulers", []) for each in (loaded, ours)]
    if len(inner[0]) != len(inner[1]):
        return [f"scheduler {type(ours).__name__}"]
    return found + [line for pair in zip(*inner, strict=True) for line in _differences(*pair)]


def _start(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Gives the groups the rates from which a schedule starts."""
    for group, wanted in zip(optimizer.param_groups, groups, strict=True):
        group |= {name: wanted[name] for name in GROUP_RATES if name in wanted}


def _advance(scheduler: Any, steps: int) -> None:
    """Takes the steps of a scheduler, up to ``steps`` of its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimiser takes none meanwhile
        for _ in range(steps - scheduler.last_epoch):
            scheduler.step()


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
