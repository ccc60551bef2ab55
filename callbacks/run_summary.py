"""What a run cost, and how its pictures are distributed: what one method is compared with another by."""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from emf_lightning.callbacks.fixed_noise_sampling import datamodule_of, draw_images, settings_of
from emf_lightning.callbacks.training_log import TrainingLog
from emf_lightning.callbacks.undisturbed import undisturbed
from emf_lightning.data.geneval_prompts import Prompt
from emf_lightning.evaluation.distances.distribution import distribution
from emf_lightning.evaluation.distances.image_features import RandomFeatures
from emf_lightning.evaluation.prompt_suite import PromptSuite
from emf_lightning.modules.flow_map import FlowMapModule

SUMMARY = "summary.json"
"""What is written, into the run directory."""

SETTLING = 8
"""Steps that are left out of the time of one: workers start, and ``SelfCheck`` takes its time."""


class RunSummary(Callback):
    """Writes ``summary.json`` at the end of ``fit``: cost, and the drawn pictures against a suite's real ones.

    Cost is optimiser steps, seconds of training alone (as ``TrainingLog`` counts them), both with what a run that is
    resumed had behind it, and this process's peak memory.
    The pictures of each step count are held against as many real ones of the same prompts: KID, FID, diversity
    (``evaluation.distribution``). On several devices rank 0 draws all of them; a sharded network is not drawn from.

    Args:
        suite: prompts, and real pictures of them.
        steps: network steps from noise to data.
        prompts_per_task: of each of the suite's tasks, the first.
        images_per_prompt: of each, at least 2; 0 leaves the pictures out.
        batch_size: images drawn at once.
        seed: of the noise.
    """

    def __init__(
        self,
        suite: PromptSuite,
        steps: list[int] | None = None,
        prompts_per_task: int = 25,
        images_per_prompt: int = 8,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        if images_per_prompt == 1 or images_per_prompt < 0:
            raise ValueError(f"RunSummary: images_per_prompt must be 2 or more, or 0, got {images_per_prompt}")
        if prompts_per_task < 1:
            raise ValueError(f"RunSummary: prompts_per_task must be at least 1, got {prompts_per_task}")
        self.suite = suite
        self.settings = settings_of(steps or [1, 2, 4], None)
        self.prompts_per_task = prompts_per_task
        self.images_per_prompt = images_per_prompt
        self.batch_size = batch_size
        self.seed = seed
        self._before = 0.0
        self._seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = self._settled = self._clock(trainer), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        self._seconds = self._before + self._clock(trainer) - self._began[0]
        if trainer.global_step == self._began[1] + SETTLING:
            self._settled = self._clock(trainer), trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FlowMapModule)
        now, step = self._clock(trainer), trainer.global_step
        settled, later = self._settled
        run = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        if not trainer.is_global_zero:
            return
        summary: dict[str, Any] = {
            "model": type(pl_module.objective).__name__,
            "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            "steps": step,
            "seconds": self._before + now - self._began[0],
            "step_seconds": (now - settled) / max(step - later, 1),
            "memory_gb": _peak_memory(pl_module.device) / 1e9,
        }
        if self.images_per_prompt:
            summary["distribution"] = self._distributions(trainer, pl_module)
        run.mkdir(parents=True, exist_ok=True)
        (run / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")

    def _clock(self, trainer: Trainer) -> float:
        logs = [callback for callback in trainer.callbacks if isinstance(callback, TrainingLog)]  # type: ignore[attr-defined]
        if not logs:
            raise ValueError("RunSummary: needs TrainingLog in trainer.callbacks, which tells training from sampling")
        return logs[0].seconds(trainer)

    def _prompts(self) -> list[Prompt]:
        """Each prompt as often as it is drawn."""
        of_task: dict[str, list[Prompt]] = {}
        for prompt in self.suite.prompts():
            of_task.setdefault(prompt.tag, []).append(prompt)
        first = [prompt for prompts in of_task.values() for prompt in prompts[: self.prompts_per_task]]
        return [prompt for prompt in first for _ in range(self.images_per_prompt)]

    def _distributions(self, trainer: Trainer, module: FlowMapModule) -> dict[str, dict[str, float]]:
        """Label -> distances and evaluations; ``real`` is one set of real pictures against another."""
        prompts, n = self._prompts(), self.images_per_prompt
        indices = [row % n for row in range(len(prompts))]
        sets = []
        for offset in (0, n):
            pictures = [self.suite.reference_image(p, offset + i) for p, i in zip(prompts, indices, strict=True)]
            sets.append([picture for picture in pictures if picture is not None])
        if len(sets[0]) < len(prompts):
            raise ValueError(f"RunSummary: {self.suite.name} has no real pictures to compare with; take ShapesSuite")
        real, network = np.stack(sets[0]), RandomFeatures()
        found = {"real": asdict(distribution(np.stack(sets[1]), real, n, network)) | {"nfe": 0}}
        drawn: dict[str, list[Any]] = {setting.label: [] for setting in self.settings}
        with undisturbed(trainer, module):
            for first in range(0, len(prompts), self.batch_size):
                rows = slice(first, first + self.batch_size)
                captions = [prompt.prompt for prompt in prompts[rows]]
                data = datamodule_of(trainer)
                for images in draw_images(module, data, captions, indices[rows], self.settings, self.seed):
                    drawn[images.setting.label].append(images.images)
        for setting in self.settings:
            scores = asdict(distribution(np.concatenate(drawn[setting.label]), real, n, network))
            found[setting.label] = scores | {"nfe": module.nfe(setting.steps, setting.guidance)}
        return found


def _peak_memory(device: torch.device) -> int:
    """In bytes: of the GPU's tensors, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
