"""Interrupts a command at a random moment, repeats it, and compares the result with an undisturbed one's."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, Features
from datasets import Image as ImageFeature
from tests.data.tars import noise_image

from benchmarks import fault_runner
from benchmarks.damage_tries import OUTCOMES, Table, copied
from benchmarks.fault_runner import Ending
from emf_lightning.cli import main
from emf_lightning.modules.checkpoint import read_checkpoint

EXPERIMENT = """
seed_everything: 3
trainer:
  accelerator: cpu
  max_steps: 12
  max_epochs: -1
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
  logger: {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: runs, name: tiny}}
  callbacks:
    - {class_path: WeightEMA, init_args: {decay: 0.9}}
    - {class_path: ModelCheckpoint, init_args: {every_n_train_steps: 3, save_last: true}}
    - {class_path: SaveNetwork}
model:
  class_path: FlowMapModule
  init_args:
    objective: {class_path: MeanFlow}
    optimization:
      scheduler: {class_path: WarmupCosine, init_args: {total: 12, warmup: 2}}
    net:
      class_path: SanaFlowMap
      init_args:
        architecture: {num_layers: 1, num_attention_heads: 1, attention_head_dim: 8,
          num_cross_attention_heads: 1, cross_attention_head_dim: 8}
data:
  shards: shards
  batch_size: 8
  num_workers: 0
  shuffle_block: 16
  text: {class_path: WordEncoder, init_args: {width: 16, length: 10}}
  autoencoder: Pixels
  cache: {path: cache, max_gb: 0.01}
"""
SAMPLING = """
trainer:
  logger: {init_args: {version: 7}}
  callbacks:
    - {class_path: CALLBACK}
data: {prompts: prompts.txt, validation_shards: shards, validation_samples: 8}
"""
CALLBACKS = {
    "predict": "SampleWriter, init_args: {steps: [1, 2]}",
    "validate": "FewStepSampling, init_args: {suite: {class_path: ShapesSuite}, steps: [1, 2], "
    "final_images_per_task: 6}",
    "test": "StepSweep, init_args: {benchmarks: [{class_path: SuiteScore, init_args: {suite: {class_path: ShapesSuite, "
    "init_args: {per_task: 3, scenes_per_task: 3}}}}], steps: [1, 2], images_per_prompt: 1}",
}
"""The callback of each verb that samples."""
SUITE = """
metric:
  class_path: SuiteScore
  init_args: {suite: {class_path: ShapesSuite, init_args: {per_task: 3, scenes_per_task: 3}}}
"""


def judge(ending: Ending, same: Callable[[], bool]) -> str:
    """The outcome of a command."""
    if ending.hung:
        return "hung"
    if ending.status == 0:
        return "right" if same() else "lost"
    return "traceback" if ending.traceback or not ending.output.strip() else "refused"


def digest(*paths: Path) -> str:
    """Digest of files and folders, by name and content."""
    found = hashlib.sha256()
    for top in paths:
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def newest(place: Path, pattern: str) -> Path | None:
    """The newest file of a pattern."""
    found = sorted(place.glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


@dataclass(frozen=True)
class Verb:
    """A command, how to go on after an interruption, and what shows its result."""

    name: str
    needs: tuple[str, ...]
    arguments: tuple[str, ...]
    result: Callable[[Path], object]

    def command(self, place: Path) -> Callable[[], object]:
        arguments = self.arguments
        if self.name == "fit" and (last := newest(place, "runs/tiny/*/checkpoints/last.ckpt")):
            arguments = (*arguments, "--ckpt_path", str(last))
        return partial(main, list(arguments))


def fit_result(place: Path) -> object:
    """The trained weights, and the network that was saved."""
    last, network = (
        newest(place, "runs/tiny/*/checkpoints/last.ckpt"),
        newest(place, "runs/tiny/*/network/*.safetensors"),
    )
    if last is None or network is None:
        return None
    content = read_checkpoint(last, "last")
    tensors = {name: hashlib.sha256(v.numpy().tobytes()).hexdigest() for name, v in content["state_dict"].items()}
    return content["global_step"], tensors, digest(network)


def export_result(place: Path) -> object:
    """The exported weights, if the folder is complete."""
    made = place / "made"
    return digest(*sorted(made.glob("*/*.safetensors"))) if (made / "model_index.json").exists() else None


def cache_result(place: Path) -> object:
    """True once a further call finds nothing to compute."""
    ending = fault_runner.run(partial(main, ["cache", "--config", "e.yaml"]), place)
    return ending.status, " 0 " in ending.output or "nothing" in ending.output or ending.status


def json_result(name: str, place: Path) -> object:
    """A JSON or JSON-lines file's content without its times."""
    path = next(iter(place.glob(name)), None)
    return path and [_timeless(json.loads(line)) for line in _documents(path)]


def _documents(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(word in k for word in ("second", "time", "took"))}
        return {key: _timeless(inner) for key, inner in kept.items()}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def folder_result(name: str, pattern: str, place: Path) -> object:
    """Digest of a folder's files that match a pattern; None where one was left unfinished."""
    folder = place / name
    if any(path.name.startswith(".") for path in folder.glob("**/*")) or not folder.is_dir():
        return None
    return digest(*sorted(folder.glob(pattern)))


def listed_result(place: Path) -> object:
    """Digest of the images of ``emf predict``, if their list is there."""
    samples = place / "runs/tiny/version_7/samples"
    return digest(samples) if (samples / "prompts.jsonl").exists() else None


def report_result(place: Path) -> object:
    """The report's numbers and figures."""
    return json_result("report/report.json", place), folder_result("report", "*.png", place)


def study_result(place: Path) -> object:
    """The study's numbers and figures."""
    return json_result("study/encoders.json", place), folder_result("study", "*.png", place)


def sampled(verb: str, result: Callable[[Path], object]) -> Verb:
    """A verb that samples the trained network."""
    arguments = (verb, "--config", "e.yaml", "--config", f"{verb}.yaml", "--ckpt_path", LAST)
    return Verb(verb, ("shards", "e.yaml", "runs", "prompts.txt", f"{verb}.yaml"), arguments, result)


LAST = "runs/tiny/version_0/checkpoints/last.ckpt"


VERBS = (
    Verb("shards", (), ("shards", "--out", "new", "--count", "64", "--samples_per_shard", "8", "--workers", "1"),
         lambda place: digest(*sorted((place / "new").glob("*.tar")))),
    Verb("fit", ("shards", "e.yaml"), ("fit", "--config", "e.yaml"), fit_result),
    Verb("cache", ("shards", "e.yaml"), ("cache", "--config", "e.yaml"), cache_result),
    Verb("score", ("images", "suite.yaml"), ("score", "images", "--config", "suite.yaml"),
         partial(json_result, "images-scores/*/scores.json")),
    Verb("export", ("shards", "e.yaml", "runs"), ("export", "--run", "runs/tiny/version_0", "--out", "made"),
         export_result),
    Verb("images", ("pictures",), ("images", "--dataset", "pictures", "--out", "written", "--samples_per_shard", "8"),
         partial(folder_result, "written", "*")),
    Verb("captions", ("prompts.txt",), ("captions", "--prompts", "prompts.txt", "--out", "texts",
         "--samples_per_shard", "4"), partial(folder_result, "texts", "*")),
    Verb("encoders", (), ("encoders", "--encoders.words", "WordEncoder", "--corpus", "ShapesPairs", "--corpus.count",
         "150", "--queries", "40", "--out", "study"), study_result),
    Verb("report", ("scored",), ("report", "scored/a", "scored/b", "--out", "report"), report_result),
    Verb("plan", ("shards", "e.yaml"), ("plan", "--config", "e.yaml"), lambda place: True),
    sampled("predict", listed_result),
    sampled("validate", partial(json_result, "runs/tiny/version_7/shapes/scores.jsonl")),
    sampled("test", partial(json_result, "runs/tiny/version_7/report.json")),
)  # fmt: skip


def prepare(world: Path) -> dict[str, tuple[float, object]]:
    """Makes the healthy things; returns each verb's seconds and result."""
    from tests.evaluation.folders.test_image_folder import write_listed
    from tests.test_report_verb import trained

    (world / "e.yaml").write_text(EXPERIMENT)
    (world / "suite.yaml").write_text(SUITE)
    for verb, callback in CALLBACKS.items():
        (world / f"{verb}.yaml").write_text(SAMPLING.replace("CALLBACK", callback))
    (world / "prompts.txt").write_text("".join(f"a photo of {number} circles\n" for number in range(24)))
    for name in ("a", "b"):
        trained(world / "scored" / name, 0.5)
    (world / "images").mkdir()
    write_listed(world / "images", 4)
    pictures = {"image": [{"bytes": noise_image(number), "path": None} for number in range(40)]}
    Dataset.from_dict(pictures, Features({"image": ImageFeature()})).save_to_disk(world / "pictures")
    healthy: dict[str, tuple[float, object]] = {}
    _must(
        fault_runner.run(
            partial(main, ["shards", "--out", "shards", "--count", "48", "--samples_per_shard", "16"]), world
        )
    )
    for verb in VERBS:
        begin = time.monotonic()
        _must(fault_runner.run(verb.command(world), world))
        healthy[verb.name] = time.monotonic() - begin, verb.result(world)
    (world / "made").rename(world / "export")
    return healthy


def _must(ending: Ending) -> None:
    if ending.status:
        raise RuntimeError(f"the healthy command failed:\n{ending.output}")


def interruption_try(
    table: Table, place: Path, rng: random.Random, world: Path, verb: Verb, how: str, healthy: tuple[float, object]
) -> None:
    """Interrupts one command, repeats it, and compares the result with the healthy one's."""
    for name in verb.needs:
        copied(world / name, place)
    seconds, want = healthy
    moment = rng.uniform(0, seconds)
    fault, same = f"`emf {verb.name}`: {how}", lambda: verb.result(place) == want
    if how == "started twice":
        first = fault_runner.start(verb.command(place), place)
        time.sleep(rng.uniform(0, seconds / 4))
        endings = [fault_runner.wait(fault_runner.start(verb.command(place), place)), fault_runner.wait(first)]
        outcomes = [judge(ending, same) for ending in endings]
        worst = max(outcomes, key=OUTCOMES.index)
        good = worst == "refused" and "right" not in outcomes
        table.add(fault, "lost" if good else worst, str([ending.output[-300:] for ending in endings]))
        return
    if how == "disk full":
        ending = fault_runner.run(verb.command(place), place, file_limit=rng.choice((0, 600, 2000, 9000, 30_000)))
        outcome = judge(ending, same)
        if outcome in ("lost", "traceback", "hung"):
            table.add(fault, outcome, ending.output[-600:])
            return
    else:
        sent = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}[how]
        ending = fault_runner.wait(fault_runner.start(verb.command(place), place), [(moment, sent)])
        if ending.hung or (ending.status == 0 and not same()):
            table.add(fault, "hung" if ending.hung else "lost", f"after {moment:.2f} s: {ending.output[-300:]}")
            return
    again = fault_runner.run(verb.command(place), place)
    outcome = judge(again, same)
    # a repeated command that refuses has lost what the first one did
    table.add(fault, "lost" if outcome == "refused" else outcome, f"{moment:.2f} s: {again.output[-600:]}")


HOWS = {"SIGKILL": 16, "SIGTERM": 5, "SIGINT": 5, "disk full": 8, "started twice": 3}
"""Tries of each interruption of each verb."""
