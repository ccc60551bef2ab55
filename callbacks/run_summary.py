"""A summary of a run, by which `emf compare` compares methods: cost, and distances of its images to real ones."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from emf_lightning.callbacks.few_step_sampling import FewStepSampling
from emf_lightning.callbacks.loggers.run_directory import run_directory
from emf_lightning.callbacks.sampling.image_generation import generate_images
from emf_lightning.callbacks.sampling.sampling_context import sampling_context
from emf_lightning.callbacks.training_log import TrainingLog
from emf_lightning.evaluation.distances.distribution import distribution
from emf_lightning.evaluation.distances.image_features import RandomFeatures
from emf_lightning.evaluation.geneval.prompt_suite import PromptSuite
from emf_lightning.evaluation.geneval.suite_score import SuiteScore
from emf_lightning.evaluation.sampling_config import SamplingConfig, sampling_configs
from emf_lightning.files import to_json, write_atomic
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.sharding import is_sharded

SUMMARY = "summary.json"
"""File name in the run directory."""

WARMUP_STEPS = 8
"""Steps left out of the time of one step: workers start, and ``SelfCheck`` runs."""


class RunSummary(Callback):
    """Writes ``summary.json`` at the end of ``fit``: cost, and distances of generated images to a suite's real ones.

    Cost is optimiser steps and seconds of training alone (as ``TrainingLog`` counts them), both including those of the
    runs that this one resumes, and the peak memory of this process.
    For each step count, generated images are compared with as many real ones of the same prompts: KID, FID, diversity
    (``evaluation.distances.distribution``). Without a suite that has real images, no distances are taken: give
    ``FewStepSampling`` ``KernelDistance`` or ``FrechetDistance`` instead. On several devices rank 0 samples all of
    them, from an unsharded network.

    Args:
        suite: prompts, and real images of them; by default the first suite with real images that ``FewStepSampling``
            scores, if there is one.
        steps: network steps from noise to data.
        prompts_per_task: prompts of each of the suite's tasks, the first ones.
        images_per_prompt: images of each prompt, at least 2; 0 leaves the distances out.
        batch_size: images sampled at once.
        seed: seed of the noise.
    """

    def __init__(
        self,
        suite: PromptSuite | None = None,
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
        self.configs = sampling_configs(steps or [1, 2, 4], None)
        self.prompts_per_task = prompts_per_task
        self.images_per_prompt = images_per_prompt
        self.batch_size = batch_size
        self.seed = seed
        self._earlier_seconds = 0.0
        self._seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier_seconds = state_dict["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(isinstance(callback, TrainingLog) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("RunSummary: needs TrainingLog in trainer.callbacks, which tells training from sampling")
        samples = self.images_per_prompt and (self.suite or _watched_suite(trainer))
        if samples and is_sharded(pl_module):  # the first rank alone samples
            raise ValueError(
                "RunSummary: images_per_prompt samples with an unsharded network: set it to 0, or train with ddp"
            )
        if self.suite is None or not self.images_per_prompt:
            return
        if self.suite.reference_image(self.suite.images(1)[0].prompt, 0) is None:
            raise ValueError(f"RunSummary: {self.suite.name} has no real images to compare with; take ShapesSuite")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = self._warm = self._training_seconds(trainer), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        self._seconds = self._earlier_seconds + self._training_seconds(trainer) - self._start[0]
        if trainer.global_step == self._start[1] + WARMUP_STEPS:
            self._warm = self._training_seconds(trainer), trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FlowMapModule)
        now, step = self._training_seconds(trainer), trainer.global_step
        warm_seconds, warm_step = self._warm
        run = run_directory(trainer)  # a collective of all ranks
        if not trainer.is_global_zero:
            return
        total = self._earlier_seconds + now - self._start[0]
        # a run that was resumed at its end has taken no step of its own
        own = (now - warm_seconds) / (step - warm_step) if step > warm_step else total / max(step, 1)
        summary: dict[str, Any] = {
            "model": type(pl_module.objective).__name__,
            "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            "steps": step,
            "seconds": total,
            "step_seconds": own,
            "memory_gb": _peak_memory(pl_module.device) / 1e9,
        }
        if self.images_per_prompt and (suite := self.suite or _watched_suite(trainer)):
            summary["distribution"] = self._distances(trainer, pl_module, suite)
        run.mkdir(parents=True, exist_ok=True)
        write_atomic(run / SUMMARY, to_json(summary))

    def _training_seconds(self, trainer: Trainer) -> float:
        logs = [callback for callback in trainer.callbacks if isinstance(callback, TrainingLog)]  # type: ignore[attr-defined]
        return logs[0].seconds(trainer)

    def _distances(self, trainer: Trainer, module: FlowMapModule, suite: PromptSuite) -> dict[str, dict[str, Any]]:
        """Tag -> distances, NFE and sampling config; ``real`` compares one set of real images with another."""
        n = self.images_per_prompt
        first = [image.prompt for image in suite.images(self.prompts_per_task) if image.index == 0]
        prompts, indices = [prompt for prompt in first for _ in range(n)], [*range(n)] * len(first)
        sets = []
        for offset in (0, n):
            images = [suite.reference_image(p, offset + i) for p, i in zip(prompts, indices, strict=True)]
            sets.append([image for image in images if image is not None])
        real, network = np.stack(sets[0]), RandomFeatures()
        distances = {"real": asdict(distribution(np.stack(sets[1]), real, n, network)) | {"nfe": 0}}
        batches: dict[SamplingConfig, list[Any]] = {config: [] for config in self.configs}
        with sampling_context(trainer, module):
            for start in range(0, len(prompts), self.batch_size):
                batch = slice(start, start + self.batch_size)
                captions = [prompt.prompt for prompt in prompts[batch]]
                for generated in generate_images(trainer, module, captions, indices[batch], self.configs, self.seed):
                    batches[generated.config].append(generated.images)
        for config, parts in batches.items():
            found = asdict(distribution(np.concatenate(parts), real, n, network))
            nfe = module.nfe(config.steps, config.guidance_scale)
            distances[config.tag] = {**found, "nfe": nfe, **asdict(config)}
        return distances


def _watched_suite(trainer: Trainer) -> PromptSuite | None:
    """The first suite with real images that ``FewStepSampling`` scores."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    benchmarks = [b for callback in callbacks if isinstance(callback, FewStepSampling) for b in callback.benchmarks]
    suites = [benchmark.suite for benchmark in benchmarks if isinstance(benchmark, SuiteScore)]
    return next((suite for suite in suites if suite.reference_image(suite.prompts()[0], 0) is not None), None)


def _peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU's tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
