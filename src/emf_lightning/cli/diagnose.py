"""`emf diagnose`: where a run's few-step images fail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from emf_lightning.cli.played_run import run_model
from emf_lightning.cli.runs import checkpoint_of, find_run
from emf_lightning.cli.trainings import check_seeds
from emf_lightning.data.shapes.world import WORLDS
from emf_lightning.evaluation.devices import device_of
from emf_lightning.evaluation.fixed_noise import fixed_noise
from emf_lightning.evaluation.geneval.prompt_suite import PromptImage, PromptSuite
from emf_lightning.evaluation.sampling_config import sampling_configs, step_name
from emf_lightning.evaluation.shapes.detector import ShapesDetector
from emf_lightning.evaluation.shapes.diagnosis.diagnosis import Boundary, Diagnosis, Samples
from emf_lightning.evaluation.shapes.diagnosis.layouts import Layout, boundary_distances
from emf_lightning.evaluation.shapes.suite import ShapesSuite
from emf_lightning.exported_files import INDEX
from emf_lightning.files import replacing
from emf_lightning.modules.checkpoint import live_weights
from emf_lightning.modules.checkpoint_files import whole_checkpoint
from emf_lightning.part_classes import trusted
from emf_lightning.pipeline import EMFPipeline
from emf_lightning.play import PARENT_STEPS, PlayedModel, exported_model
from emf_lightning.text.base import NULL_CAPTION

SIZES = (0.05, 0.1, 0.2, 0.4)
"""Sizes of the steps from the noise towards a random direction, see ``boundary_distances``."""
PER_PROMPT = 2
"""Images of each prompt: the fewest that show a variance within it."""

Weights = Mapping[str, Tensor]


def diagnose(
    run: Path,
    against: Path | None = None,
    parent: Path | None = None,
    checkpoint: Path | None = None,
    out: Path | None = None,
    steps: list[int] | None = None,
    parent_steps: int = PARENT_STEPS,
    images: int = 600,
    near: float = 0.05,
    boundary_images: int = 100,
    directions: int = 2,
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
) -> None:
    """Say where few-step images of a shapes world fail, beside the parent's images of the same noise.

    The page has the kinds of failures by task, of seen and held-out compositions; the agreement with the parent's
    image; the error by the distance of the noise to a boundary where the parent's layouts part; the variance against
    the parent's and that of real pictures; and averaged weights beside the live ones of the same checkpoint. A call
    that was interrupted is repeated; it keeps the images that it has.

    Args:
        run: its directory, runs/<name> for its newest version, one of its checkpoints, or an exported folder.
        against: a second run or exported folder, in the same tables; e.g. a wider network from the same parent.
        parent: run or exported folder of the flow-matching model; by default the model that `run` started from.
        checkpoint: which of the run's checkpoints; by default checkpoints/last.ckpt.
        out: directory for diagnosis.md, .json and .png; by default diagnosis in the run's directory, or
            FOLDER-diagnosis beside an exported one.
        steps: step counts of the models; 1, 2 and 4 by default.
        parent_steps: Euler steps of the parent.
        images: number of images, the same of each task, two of each prompt.
        near: distance up to which an image is near the parent's: the root mean square over pixels in [0, 1].
        boundary_images: for how many images the distance of the noise is measured, which takes up to 8 images of the
            parent each; 0 leaves it out.
        directions: random directions in which the distance is measured.
        seed: of the noise.
        batch_size: images sampled at once.
        device: of all parts; by default cuda where there is one.
    """
    for name, value, least in (
        ("images", images, 12),
        ("parent_steps", parent_steps, 1),
        ("boundary_images", boundary_images, 0),
        ("directions", directions, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not near > 0:
        raise ValueError(f"near must be above 0, got {near}")
    check_seeds([seed])
    device_of(device)
    counts = [config.steps for config in sampling_configs(sorted(steps or [1, 2, 4]), None)]
    folder, models, teacher, remark = _models(run, checkpoint, against, parent, device)
    suite = ShapesSuite(_world_of(models[0].pipeline))
    asked, detector, out = images_of(suite, images), ShapesDetector(suite.world), out or folder
    prompts, reach = [one.prompt for one in asked], suite.world.cell / 2
    sampler = _Sampler([(one.prompt.prompt, one.index) for one in asked], seed, batch_size, out / "images")

    def samples(model: _Model, number: int) -> Samples:
        return Samples.of(model.name, number, sampler.images(model, number), prompts, detector)

    parents, boundary = samples(teacher, parent_steps), None
    if boundary_images:
        rows = np.linspace(0, len(asked) - 1, min(boundary_images, len(asked))).astype(int).tolist()

        def layouts_of(numbers: Sequence[int], noise: Tensor) -> Sequence[Layout]:
            chosen = [rows[number] for number in numbers]
            return detector.detect_batch(sampler.images(teacher, parent_steps, chosen, noise))

        towards = [sampler.noise(teacher, rows, f"direction {k}: ") for k in range(directions)]
        before, noise = [parents.layouts[row] for row in rows], sampler.noise(teacher, rows)
        found = boundary_distances(before, noise, towards, SIZES, layouts_of, reach)
        boundary = Boundary(rows, found, SIZES, directions)
    real = np.stack([suite.reference_image(one.prompt, one.index) for one in asked])
    about = {
        "run": str(run),
        **({"against": str(against)} if against else {}),
        "parent": f"{remark} {parent_steps} steps, guidance {teacher.pipeline.config.guidance_scale:g}.",
        "images": f"{len(asked):,}, shapes world {suite.world.name!r}, seed {seed}",
    }
    diagnosis = Diagnosis(
        prompts=prompts,
        parent=parents,
        models=[samples(model, number) for model in models for number in counts],
        real=Samples.of("real pictures", 0, real, prompts, detector),
        near=near,
        reach=reach,
        boundary=boundary,
        about=about,
    )
    print(diagnosis.write(out))
    print(f"diagnosis.md, diagnosis.json and diagnosis.png: {out}")


def images_of(suite: PromptSuite, count: int) -> list[PromptImage]:
    """``count`` images, the same number of each task, ``PER_PROMPT`` of each prompt before a prompt has more."""
    images = []
    for tag in dict.fromkeys(prompt.tag for prompt in suite.prompts()):
        task = [(prompt, number) for number, prompt in enumerate(suite.prompts()) if prompt.tag == tag]
        for k in range(count // len({prompt.tag for prompt in suite.prompts()})):
            again, place = divmod(k, PER_PROMPT * len(task))
            prompt, number = task[place // PER_PROMPT]
            images.append(PromptImage(prompt, again * PER_PROMPT + place % PER_PROMPT, number))
    return images


@dataclass(frozen=True)
class _Model:
    """A pipeline, and the weights of its network where several models share it."""

    name: str
    pipeline: EMFPipeline
    weights: Weights

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        side = self.pipeline.config.latent_size
        return self.pipeline.vae.part.channels, side, side

    @cached_property
    def digest(self) -> str:
        """Of everything that decides an image beside its prompt, noise and number of steps."""
        config, text = self.pipeline.config, self.pipeline.text_encoder.part
        names = ("sampler", "guidance", "guidance_scale", "autocast", "features")
        about = {name: config[name] for name in names} | {"text": text.fingerprint, "variant": text.variant}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        for name, value in self.weights.items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Sampler:
    """Images of prompts and image numbers, kept in files under the digest of what they depend on."""

    requested: Sequence[tuple[str, int]]
    seed: int
    batch_size: int
    folder: Path

    def noise(self, model: _Model, rows: Sequence[int], prefix: str = "") -> Tensor:
        """Noise of images: that of `emf predict`, or with ``prefix`` before the prompt independent of it."""
        wanted = [self.requested[row] for row in rows]
        return torch.stack([fixed_noise(self.seed, prefix + text, i, model.noise_shape) for text, i in wanted])

    def images(
        self, model: _Model, steps: int, rows: Sequence[int] | None = None, noise: Tensor | None = None
    ) -> NDArray[np.uint8]:
        """8-bit RGB ``[N, H, W, 3]`` of the requested images, or of some, from their own or other noise."""
        rows = range(len(self.requested)) if rows is None else rows
        noise = self.noise(model, rows) if noise is None else noise
        texts = [self.requested[row][0] for row in rows]
        key = hashlib.sha256(json.dumps([model.digest, steps, texts]).encode() + noise.numpy().tobytes()).hexdigest()
        path = self.folder / f"{key[:16]}.npy"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, shared=True) as partial, partial.open("wb") as file:
                np.save(file, self._sampled(model, steps, texts, noise))
        found: NDArray[np.uint8] = np.load(path)
        return found

    def _sampled(self, model: _Model, steps: int, texts: Sequence[str], noise: Tensor) -> NDArray[np.uint8]:
        pipeline, images = model.pipeline, list[NDArray[np.uint8]]()
        pipeline.transformer.part.load_state_dict(model.weights)
        with tqdm(desc=f"{model.name}, {step_name(steps)}", total=len(texts), unit="image") as bar:
            for first in range(0, len(texts), self.batch_size):
                part = slice(first, first + self.batch_size)
                (found,) = pipeline(texts[part], num_inference_steps=steps, latents=noise[part], return_dict=False)
                images += [np.asarray(image) for image in found]
                bar.update(len(found))
        return np.stack(images)


def _models(
    run: Path, checkpoint: Path | None, against: Path | None, parent: Path | None, device: str | None
) -> tuple[Path, list[_Model], _Model, str]:
    """The folder for the page, the models of the tables, the parent, and a sentence on the parent."""
    played = _played(run, checkpoint, device)
    models = _variants(played, run, checkpoint)
    if against is not None:
        other = _played(against, None, device)
        names = {model.name for model in models}
        models += [
            replace(model, name=model.name if model.name not in names else f"{against}, {model.name}")
            for model in _variants(other, against, None)
        ]
    if parent is not None:
        found, remark = _played(parent, None, device).pipeline, f"The parent is {parent}."
    elif played.parent is not None:
        found, remark = played.parent, played.remark
    else:
        raise ValueError(f"parent: {played.remark} Name it with --parent, a run or an exported folder")
    teacher = _Model("parent", found, _copied(found))
    for model in models:
        if model.noise_shape != teacher.noise_shape:
            raise ValueError(
                f"parent: its latents are {list(teacher.noise_shape)}, those of {model.name} "
                f"{list(model.noise_shape)}: the two share no noise; give models of one autoencoder and size"
            )
    exported = (run / INDEX).is_file()
    folder = (
        run.resolve().with_name(f"{run.resolve().name}-diagnosis")
        if exported
        else find_run(run).directory / "diagnosis"
    )
    return folder, models, teacher, remark


def _played(run: Path, checkpoint: Path | None, device: str | None) -> PlayedModel:
    exported = (run / INDEX).is_file()
    return exported_model(run, device, trusted()) if exported else run_model(run, checkpoint).to(device)


def _variants(played: PlayedModel, run: Path, checkpoint: Path | None) -> list[_Model]:
    """The model, and its live weights where the checkpoint holds averages beside them."""
    models = [_Model(played.name, played.pipeline, _copied(played.pipeline))]
    if not (run / INDEX).is_file():
        live = live_weights(whole_checkpoint(checkpoint_of(find_run(run), checkpoint)))
        if live is not None:
            models.append(_Model(f"{played.name}, live", played.pipeline, {**models[0].weights, **live}))
    return models


def _copied(pipeline: EMFPipeline) -> Weights:
    """The weights of a pipeline's network, which other models' replace while those are sampled."""
    return {name: value.detach().clone() for name, value in pipeline.transformer.part.state_dict().items()}


def _world_of(pipeline: EMFPipeline) -> str:
    """The name of the shapes world whose images have the size of the pipeline's."""
    (images,) = pipeline(NULL_CAPTION, num_inference_steps=1, return_dict=False)
    side = images[0].width
    for world in WORLDS.values():
        if world.canvas == side:
            return world.name
    sides = ", ".join(f"{world.canvas} ({world.name})" for world in WORLDS.values())
    raise ValueError(f"run: its images have {side} pixels a side; the shapes worlds have {sides}")
