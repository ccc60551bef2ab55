"""Images of prompts, for `emf predict`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from emf_lightning.callbacks.experiment_progress_bar import show_line
from emf_lightning.callbacks.loggers.run_directory import run_directory
from emf_lightning.callbacks.sampling.all_gather import all_gather_list
from emf_lightning.callbacks.sampling.image_generation import generate_images
from emf_lightning.callbacks.sampling.sampling_context import sampling_context
from emf_lightning.evaluation.fixed_noise import noise_indices
from emf_lightning.evaluation.folders.image_folder import PROMPTS
from emf_lightning.evaluation.sampling_config import sampling_configs
from emf_lightning.files import write_json_lines
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.sharding import is_sharded


class SampleWriter(Callback):
    """Writes an image of each prompt at each step count, ``00012-4step.png``, and lists them in ``prompts.jsonl``.

    The noise is that of ``FewStepSampling`` with the same seed; a line that repeats an earlier one goes on with the
    next image of that prompt. Lightning's ``BasePredictionWriter`` takes the images from ``predict_step``; here this
    callback samples them, one step count after the other.

    Args:
        steps: network steps from noise to data.
        guidance_scale: scale of classifier-free guidance, or several; by default the module's own.
        images_per_prompt: images of each prompt; names of the second and further ones end in their number,
            ``00012-4step-1.png``.
        seed: seed of the noise.
        folder: folder below the run directory, or an absolute path.
    """

    def __init__(
        self,
        steps: Sequence[int] = (1, 2, 4),
        guidance_scale: list[float] | float | None = None,
        images_per_prompt: int = 1,
        seed: int = 0,
        folder: Path = Path("samples"),
    ) -> None:
        if images_per_prompt < 1:
            raise ValueError(f"SampleWriter: images_per_prompt must be at least 1, got {images_per_prompt}")
        self.configs = sampling_configs(steps, guidance_scale)
        self.images_per_prompt = images_per_prompt
        self.seed = seed
        self.folder = folder
        self._rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_sharded(pl_module):  # ranks with different numbers of prompts would wait for each other's weights
            raise ValueError("SampleWriter: sample with an unsharded network: --trainer.strategy auto, or ddp")
        self._rows.clear()
        loader: Any = trainer.predict_dataloaders  # its data set is the whole list, whichever part this rank has
        self._occurrences = noise_indices([(prompt, 0) for prompt in loader.dataset.prompts])
        self._directory = run_directory(trainer) / self.folder  # a collective of all ranks
        self._directory.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero:  # an earlier call's list does not vouch for images of which some are replaced
            (self._directory / PROMPTS).unlink(missing_ok=True)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        from PIL import Image

        assert isinstance(pl_module, FlowMapModule)
        numbers, captions = [int(number) for number in batch[0]], list(batch[1])
        with sampling_context(trainer, pl_module):
            for index in range(self.images_per_prompt):
                indices = [self._occurrences[number] * self.images_per_prompt + index for number in numbers]
                for generated in generate_images(trainer, pl_module, captions, indices, self.configs, self.seed):
                    config, suffix = generated.config.resolve(pl_module.guidance_scale), f"-{index}" if index else ""
                    for number, caption, image in zip(numbers, captions, generated.images, strict=True):
                        name = f"{number:05d}-{config.tag}{suffix}.png"
                        Image.fromarray(image).save(self._directory / name)
                        row = {"index": number, "prompt": caption, "file": name, "image": index, "steps": config.steps}
                        nfe = pl_module.nfe(config.steps, config.guidance_scale)
                        self._rows.append({**row, "nfe": nfe, "guidance": config.guidance_scale})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = all_gather_list(trainer, self._rows)
        rows.sort(key=lambda row: (row["index"], row["image"], row["steps"]))
        if trainer.is_global_zero:
            write_json_lines(self._directory / PROMPTS, rows)
            show_line(trainer, f"{len(rows)} images and {PROMPTS}: {self._directory}", at_end=True)
