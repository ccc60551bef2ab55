"""Images of a file of prompts, for `emf predict`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from emf_lightning.callbacks.fixed_noise_sampling import datamodule_of, draw_images, settings_of
from emf_lightning.callbacks.gathering import gathered
from emf_lightning.callbacks.undisturbed import undisturbed
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.sharding import is_sharded


class SampleWriter(Callback):
    """Draws each prompt at each step count: ``00012-4step.png``, and ``prompts.jsonl`` that says what is what.

    The noise is that of ``FewStepSampling`` with the same seed. Lightning's ``BasePredictionWriter`` wants the images
    from ``predict_step``; here they come step count by step count, and what is drawn is this callback's choice.

    Args:
        steps: network steps from noise to data.
        guidance: scale of classifier-free guidance, or several; by default the module's own.
        images_per_prompt: each from its own noise; from the second on the name has the number, ``00012-4step-1.png``.
        seed: of the noise.
        folder: below the run directory, or an absolute path.
    """

    def __init__(
        self,
        steps: Sequence[int] = (1, 2, 4),
        guidance: list[float] | float | None = None,
        images_per_prompt: int = 1,
        seed: int = 0,
        folder: Path = Path("samples"),
    ) -> None:
        if images_per_prompt < 1:
            raise ValueError(f"SampleWriter: images_per_prompt must be at least 1, got {images_per_prompt}")
        self.settings = settings_of(steps, guidance)
        self.images_per_prompt = images_per_prompt
        self.seed = seed
        self.folder = folder
        self._rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_sharded(pl_module):  # ranks with different numbers of prompts would wait for each other's weights
            raise ValueError("SampleWriter: draw with an unsharded network: --trainer.strategy auto, or ddp")
        self._rows.clear()
        self._directory = Path(trainer.log_dir or trainer.default_root_dir) / self.folder  # asks all ranks
        self._directory.mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        from PIL import Image

        assert isinstance(pl_module, FlowMapModule)
        numbers, captions = [int(number) for number in batch[0]], list(batch[1])
        with undisturbed(trainer, pl_module):
            for index in range(self.images_per_prompt):
                data, indices = datamodule_of(trainer), [index] * len(captions)
                for drawn in draw_images(pl_module, data, captions, indices, self.settings, self.seed):
                    setting, suffix = drawn.setting, f"-{index}" if index else ""
                    for number, caption, image in zip(numbers, captions, drawn.images, strict=True):
                        name = f"{number:05d}-{setting.label}{suffix}.png"
                        Image.fromarray(image).save(self._directory / name)
                        self._rows.append(
                            {
                                "index": number,
                                "prompt": caption,
                                "file": name,
                                "image": index,
                                "steps": setting.steps,
                                "nfe": pl_module.nfe(setting.steps, setting.guidance),
                                "guidance": pl_module.guidance_scale if setting.guidance is None else setting.guidance,
                            }
                        )

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = sorted(gathered(trainer, self._rows), key=lambda row: (row["index"], row["image"], row["steps"]))
        if trainer.is_global_zero:
            (self._directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
