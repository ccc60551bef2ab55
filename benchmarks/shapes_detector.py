"""Measures the shapes detector: what it accepts, what it refuses, what it confuses, how long it takes.

Writes docs/results/shapes_detector.md; `python benchmarks/shapes_detector.py --help` names the options.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emf_lightning.data.geneval_prompts import BACKGROUND, PALETTE, TASKS, Prompt, colors
from emf_lightning.data.shapes.prompts import evaluation_prompts, random_prompt
from emf_lightning.data.shapes.scenes import Scene, SceneObject, scene_for
from emf_lightning.data.shapes.world import FULL, SMALL, World
from emf_lightning.evaluation.geneval.task_scores import HEADINGS, TaskScores
from emf_lightning.evaluation.geneval.verdict import Detection, evaluate
from emf_lightning.evaluation.metric_scores import MetricScores
from emf_lightning.evaluation.reports.score_table import score_table
from emf_lightning.evaluation.shapes.detector import ShapesDetector
from emf_lightning.evaluation.shapes.templates import gaussian

SEED = 20
Images = NDArray[np.uint8]


def to_bytes(images: NDArray[np.floating]) -> Images:
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def noise(images: Images, sigma: float, rng: np.random.Generator) -> Images:
    return to_bytes(images + rng.normal(0, sigma, images.shape))


def blur(images: Images, sigma: float) -> Images:
    """Gaussian blur on ground that goes on beyond the border."""
    ground = np.array(BACKGROUND, np.float32)
    excess = (images - ground).transpose(0, 3, 1, 2).astype(np.float32)
    return to_bytes(gaussian(excess, sigma).transpose(0, 2, 3, 1) + ground)


def jpeg(images: Images, subsampling: int) -> Images:
    """Quality 90; ``subsampling`` 0 keeps colour at full resolution, 2 halves it."""
    result = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90, subsampling=subsampling)
        result.append(np.asarray(Image.open(file)))
    return np.stack(result)


def perturbations(rng: np.random.Generator) -> dict[str, Callable[[Images], Images]]:
    return {
        "clean": lambda x: x,
        "noise σ 8": lambda x: noise(x, 8, rng),
        "noise σ 16": lambda x: noise(x, 16, rng),
        "blur .5 px": lambda x: blur(x, 0.5),
        "blur .8 px": lambda x: blur(x, 0.8),
        "blur 1 px": lambda x: blur(x, 1.0),
        "blur .5 px, noise σ 16": lambda x: noise(blur(x, 0.5), 16, rng),
        "tint ±15": lambda x: to_bytes(x + rng.uniform(-15, 15, (len(x), 1, 1, 3))),
        "contrast × .75": lambda x: to_bytes(128 + 0.75 * (x - 128.0)),
        "JPEG q90, colour halved": lambda x: jpeg(x, 2),
        "JPEG q90, full colour": lambda x: jpeg(x, 0),
        "blur 2 px (report only)": lambda x: blur(x, 2.0),
    }


def corrupted(world: World, scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with the least change that makes its prompt untrue."""
    objects = list(scene.objects)
    first = objects[0]
    match scene.prompt.tag:
        case "single_object" | "two_object":
            others = [shape for shape in world.shapes if shape not in {o.shape for o in objects}]
            objects[0] = replace(first, shape=others[rng.integers(len(others))])
        case "counting":
            if rng.random() < 0.5 or len(objects) == world.grid**2:
                objects.pop()
            else:
                objects.append(replace(first, centre=free_centre(world, objects, rng)))
        case "colors":
            others = [colour for colour in world.colours if colour != first.colour]
            objects[0] = replace(first, colour=others[rng.integers(len(others))])
        case "position":
            objects = [replace(first, centre=objects[1].centre), replace(objects[1], centre=first.centre)]
        case "color_attr":
            objects = [replace(first, colour=objects[1].colour), replace(objects[1], colour=first.colour)]
    return Scene(scene.prompt, tuple(objects))


def free_centre(world: World, objects: list[SceneObject], rng: np.random.Generator) -> tuple[float, float]:
    """The middle of a cell without an object."""
    taken = {tuple(int(c // world.cell) for c in o.centre) for o in objects}
    free = [(x, y) for x in range(world.grid) for y in range(world.grid) if (x, y) not in taken]
    x, y = free[rng.integers(len(free))]
    return (x + 0.5) * world.cell, (y + 0.5) * world.cell


def garbage(world: World, n: int, rng: np.random.Generator) -> dict[str, Images]:
    side, scale = world.canvas, world.canvas / 36
    ground = np.array(BACKGROUND, np.float32)
    palette = np.array([PALETTE[name] for name in world.colours], np.float32)

    def field(sigma: float, channels: int) -> NDArray[np.float32]:
        smooth = gaussian(rng.normal(size=(n, channels, side, side)).astype(np.float32), sigma * scale)
        return (smooth / smooth.std()).transpose(0, 2, 3, 1)

    def flat(sigma: float, level: float) -> Images:
        colour = palette[rng.integers(len(palette), size=n)][:, None, None]
        return to_bytes(ground + np.clip(3 * (field(sigma, 1) - level) + 0.5, 0, 1) * (colour - ground))

    quantised = ground + 70 * field(2, 3)
    colours = np.concatenate([palette, ground[None]])
    nearest = ((quantised[..., None, :] - colours) ** 2).sum(-1).argmin(-1)
    return {
        "uniform noise": rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8),
        "grey noise σ 40": to_bytes(ground + rng.normal(0, 40, (n, side, side, 3))),
        "one flat colour": np.broadcast_to(
            rng.integers(0, 256, (n, 1, 1, 3), dtype=np.uint8), (n, side, side, 3)
        ).copy(),
        "smooth colour blobs, small": to_bytes(ground + 70 * field(2, 3)),
        "smooth colour blobs, large": to_bytes(ground + 70 * field(4, 3)),
        "blobs of palette colours": to_bytes(colours[nearest]),
        "blobs of one palette colour, many": flat(2, 0.8),
        "blobs of one palette colour, few": flat(3, 1.5),
    }


def rates(detections: list[list[Detection]], prompts: list[Prompt], strict: bool = False) -> NDArray[np.floating]:
    """Share accepted, task by task."""
    tags = np.array([prompt.tag for prompt in prompts])
    verdicts = [evaluate(d, prompt) for d, prompt in zip(detections, prompts, strict=True)]
    accepted = np.array([v.strict if strict else v.correct for v in verdicts])
    return np.array([accepted[tags == tag].mean() for tag in TASKS])


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def shares(values: NDArray[np.floating]) -> list[str]:
    return [f"{value:.3f}" for value in values]


def confusion(world: World, detector: ShapesDetector, rng: np.random.Generator, per_pair: int) -> list[str]:
    """What single objects of every colour and shape are read as, noisy ones."""
    prompts = [colors(c, s) for c in world.colours for s in world.shapes for _ in range(per_pair)]
    scenes = [scene_for(world, prompt, rng) for prompt in prompts]
    images = noise(blur(np.stack([scene.render(world) for scene in scenes]), 0.5), 16, rng)
    shapes, colours = [*world.shapes, "unknown", "nothing"], [*world.colours, "nothing"]
    by_shape = np.zeros((len(world.shapes), len(shapes)), int)
    by_colour = np.zeros((len(world.colours), len(colours)), int)
    for scene, seen in zip(scenes, detector.detect_batch(images), strict=True):
        (truth,) = scene.objects
        best = seen[0] if seen else None
        by_shape[world.shapes.index(truth.shape), shapes.index(best.label if best else "nothing")] += 1
        by_colour[world.colours.index(truth.colour), colours.index((best and best.colour) or "nothing")] += 1
    lines = [f"Blur .5 px and noise σ 16, {per_pair} objects of each colour and shape; rows are the true class.", ""]
    for names, counts, heads in ((world.shapes, by_shape, shapes), (world.colours, by_colour, colours)):
        rows = [
            [name, *(str(count) if count else "·" for count in row)] for name, row in zip(names, counts, strict=True)
        ]
        lines += [*table(["", *heads], rows), ""]
    return lines


def measure(world: World, per_task: int) -> list[str]:
    """The section on one world."""
    rng = np.random.default_rng(SEED)
    detector = ShapesDetector(world)
    scenes = [scene_for(world, random_prompt(world, tag, rng), rng) for tag in TASKS for _ in range(per_task)]
    prompts = [scene.prompt for scene in scenes]
    images = np.stack([scene.render(world) for scene in scenes])
    wrong = np.stack([corrupted(world, scene, rng).render(world) for scene in scenes])
    heads = ["", *(HEADINGS[tag] for tag in TASKS), "mean"]

    true_rows, false_rows = [], []
    for name, perturb in perturbations(rng).items():
        right = rates(detector.detect_batch(perturb(images)), prompts)
        false = rates(detector.detect_batch(perturb(wrong)), prompts)
        true_rows.append([name, *shares(right), f"{right.mean():.4f}"])
        false_rows.append([name, *shares(false), f"{false.mean():.4f}"])

    suite = evaluation_prompts(world)
    by_task = {tag: [prompt for prompt in suite if prompt.tag == tag] for tag in TASKS}
    asked = [by_task[tag][i % len(by_task[tag])] for tag in TASKS for i in range(per_task)]
    garbage_rows = []
    for name, images in garbage(world, per_task, rng).items():
        seen = detector.detect_batch(images)
        values = rates(seen * len(TASKS), asked)
        objects = sum(d.label in world.shapes for found in seen for d in found) / len(seen)
        garbage_rows.append([name, *shares(values), f"{values.mean():.4f}", f"{objects:.3f}"])
    other_ground = to_bytes(images.astype(np.float32) + np.array([40.0, -40.0, 40.0]))
    values = rates(detector.detect_batch(other_ground), prompts)
    garbage_rows.append(["right objects on another ground", *shares(values), f"{values.mean():.4f}", ""])

    def score(sampled: list[Prompt]) -> TaskScores:
        images = np.stack([scene_for(world, prompt, rng).render(world) for prompt in sampled])
        seen = detector.detect_batch(images)
        return TaskScores.of((prompt, evaluate(d, prompt)) for prompt, d in zip(asked, seen, strict=True))

    others = []
    for prompt in asked:
        task = by_task[prompt.tag]
        others.append(task[(task.index(prompt) + rng.integers(1, len(task))) % len(task)])
    limits = {"ceiling": score(asked), "chance": score(others)}

    began = time.process_time()
    detector.detect_batch(images)
    batch = (time.process_time() - began) / len(images)
    began = time.process_time()
    for image in images[:200]:
        detector(image)
    single = (time.process_time() - began) / 200

    counts = f"{len(world.shapes)} shapes × {len(world.colours)} colours, {world.canvas} px"
    return [
        f"## The {world.name} world ({counts})",
        "",
        f"Detection takes {1e3 * batch:.2f} ms an image in a batch, {1e3 * single:.2f} ms alone (processor time).",
        "",
        "### True acceptance: scenes that show their prompt",
        "",
        *table(heads, true_rows),
        "",
        "### False acceptance: the same scenes with one change that makes the prompt untrue",
        "",
        "A wrong shape (single, two), one object more or less (counting), another colour (colours), the two objects",
        "exchanged (position), their colours exchanged (attribution).",
        "",
        *table(heads, false_rows),
        "",
        "### False acceptance: images without a scene",
        "",
        *table([*heads, "objects an image"], garbage_rows),
        "",
        "### Ceiling and chance",
        "",
        "Clean scenes of the evaluation prompts, scored against their own prompt (ceiling) and against another prompt",
        "of the same task (chance).",
        "",
        score_table({name: {"": MetricScores.of_tasks(scores, "")} for name, scores in limits.items()}),
        "",
        "### Confusion matrices",
        "",
        *confusion(world, detector, rng, max(per_task // 8, 1)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-task", type=int, default=200, help="scenes, garbage images and prompts for each task")
    results = Path(__file__).parents[1] / "docs" / "results"
    parser.add_argument("--out", type=Path, default=results / "shapes_detector.md")
    options = parser.parse_args()
    n = options.per_task
    lines = [
        "# Shapes detector: acceptance rates",
        "",
        f"`benchmarks/shapes_detector.py` (`make bench`) writes this page: seed {SEED}, {n} scenes for each task and",
        "row, scored by GenEval's rule (threshold .3, counting .9), one thread. A rate of 1.000 is at least",
        f"{1 - 3 / n:.3f} and a rate of 0.000 at most {3 / n:.3f}, with 95 % confidence. The detector refuses images",
        "blurred by 2 px by design; their row is for information.",
        "",
    ]
    for world in (SMALL, FULL):
        lines += measure(world, n)
    options.out.write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
