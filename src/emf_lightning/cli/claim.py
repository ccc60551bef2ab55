"""`emf claim`: trains one network on encoders of graded quality, and tests whether few-step scores fall more."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from emf_lightning.callbacks.few_step_sampling import SCORES
from emf_lightning.cli.parsing.experiment_files import read_yaml, settings_of
from emf_lightning.cli.parsing.experiment_loggers import holds_settings
from emf_lightning.cli.shipped import named_experiments
from emf_lightning.cli.sizes import build_part
from emf_lightning.cli.trainings import check_seeds, fit, run_in_parallel
from emf_lightning.evaluation.bootstrap import Estimate
from emf_lightning.evaluation.encoders.claim import FEW_STEPS, MANY_STEPS, Claim, ClaimRun
from emf_lightning.evaluation.encoders.discriminability import check_retrieval, discriminability
from emf_lightning.evaluation.encoders.features import pooled_features
from emf_lightning.evaluation.encoders.pair_corpus import PairCorpus
from emf_lightning.evaluation.score_history import ScoreHistory
from emf_lightning.evaluation.shapes.pairs import ShapesPairs
from emf_lightning.files import write_atomic
from emf_lightning.text import degraded, words  # noqa: F401  classes that the experiments name
from emf_lightning.text.base import TextEncoder

GRADES = ("noise=0", "noise=1", "noise=2", "shared=3", "steps=1200")
"""Grades with a discriminability from .44 to .21, and two controls with that of the best grade.

The features of ``shared=3`` are nearly parallel; the parent of ``steps=1200`` is trained for fewer steps, so that it
scores as a parent with poor features.
"""


def claim(
    grades: list[str] | None = None,
    seeds: list[int] | None = None,
    out: Path = Path("runs/claim"),
    flow_matching: Path = Path("experiments/claim/flow_matching.yaml"),
    meanflow: Path = Path("experiments/claim/meanflow.yaml"),
    options: list[str] | None = None,
    pairs: int = 3000,
    jobs: int = 1,
    train: bool = True,
) -> None:
    """Train on encoders of graded quality by flow matching, then MeanFlow, and compare their few-step scores.

    Repeat an interrupted call: it keeps finished trainings and resumes the others. A call with another ``meanflow``
    and the same ``out`` starts from the same parents. A quarter of an hour for each grade and seed on two cores.

    Args:
        grades: noise=NUMBER and shared=NUMBER set DegradedEncoder, as a grade of the scale and as a control;
            steps=NUMBER is a control whose parent trains for that many steps; five by default.
        seeds: seeds of the trainings; 0, 1 and 2 by default.
        out: directory of all trainings, and of claim.md, claim.json and claim.png; of claim-NAME.md and so on where
            ``meanflow`` is NAME.yaml.
        flow_matching: experiment of the parents.
        meanflow: experiment that adapts the parents, by MeanFlow or another few-step objective, e.g. claim/refined.
        options: further options for all trainings, e.g. '["--data.batch_size", "32"]'; a grade's own settings win.
        pairs: number of caption-image pairs that measure discriminability.
        jobs: trainings at the same time, each with its share of the CPU's threads.
        train: false reports the finished trainings without training.
    """
    chosen, numbers = grades or list(GRADES), seeds if seeds is not None else [0, 1, 2]
    if not numbers:
        raise ValueError("seeds: the list is empty; give at least one")
    check_seeds(numbers)
    settings = {grade: _settings(grade) for grade in chosen}
    [flow_matching], [meanflow] = (
        named_experiments(name, [file]) for name, file in (("flow_matching", flow_matching), ("meanflow", meanflow))
    )
    corpus, measured = ShapesPairs(count=pairs), dict[str, Estimate]()
    try:
        check_retrieval(corpus, 2)
    except ValueError as error:
        raise ValueError(f"pairs: {pairs} are too few ({error})") from None
    kinds = {"flow_matching": flow_matching, "meanflow": meanflow}
    if flow_matching.stem == meanflow.stem:
        raise ValueError(f"meanflow: {meanflow.name} has the name of flow_matching's file; rename one, as runs have it")
    if train:
        _check_same_settings(out, list(kinds.values()), options or [])
    name = "claim" if meanflow.stem == "meanflow" else f"claim-{meanflow.stem}"
    objective = _objective_of(meanflow)
    trainings = {  # seed by seed, so that the first whole scale is there early
        (seed, grade): {kind: out / f"{grade}-seed{seed}-{file.stem}" for kind, file in kinds.items()}
        for seed in numbers
        for grade in chosen
    }

    def train_both(seed: int, grade: str) -> None:
        start: list[str] = []
        for kind, folder in trainings[seed, grade].items():
            if not _final_scores(folder):
                common = [*(options or []), *settings[grade][kind], "--seed_everything", str(seed)]
                fit(["--config", str(kinds[kind]), *common, *start], folder, jobs)
            start = ["--model.init_args.net.init_args.pretrained", str(folder / "network")]

    def finished() -> tuple[ClaimRun, ...]:
        runs = []
        for (seed, grade), folders in trainings.items():
            scores = [_final_scores(folder) for folder in folders.values()]
            if all(scores):
                if grade not in measured:
                    measured[grade] = _measure_discriminability(folders["meanflow"], corpus)
                runs.append(ClaimRun(grade, grade.startswith("noise"), seed, measured[grade], scores[0], scores[1]))
        return tuple(runs)

    for _ in run_in_parallel([partial(train_both, *key) for key in trainings] if train else [], jobs):
        if so_far := finished():
            Claim(so_far, objective).write(out, name)
    found = Claim(finished(), objective)
    if not found.runs:
        raise ValueError(f"out: no finished trainings in {out}; leave out --train false")
    found.write(out, name)
    print(found.markdown())
    print(f"{name}.md, {name}.json and {name}.png: {out}")


def _objective_of(experiment: Path) -> str:
    """Name of the objective's class in an experiment's files, or that of the file where none names it."""
    for node in reversed(settings_of([experiment])):
        for key in ("model", "init_args", "objective", "class_path"):
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, str):
            return node.rpartition(".")[2]
    return experiment.stem


def _check_same_settings(out: Path, experiments: list[Path], options: list[str]) -> None:
    """Raises a ``ValueError`` where ``out`` holds trainings of other settings; records the settings otherwise."""
    earlier = out / "trained.yaml"  # an earlier version's record, of both experiments
    records = {out / f"trained-{file.stem}.yaml": [file] for file in experiments}
    contents = {
        record: yaml.safe_dump([*settings_of(files), options], sort_keys=False)
        for record, files in ({earlier: experiments} | records).items()
    }
    for record, content in contents.items():
        if record.is_file() and not holds_settings(record, content):
            raise ValueError(f"out: the trainings in {out} are of other settings, see {record}; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    for record in records:
        write_atomic(record, contents[record])


def _settings(grade: str) -> dict[str, list[str]]:
    """Options of a grade for the parent's training and for the model's."""
    name, _, value = grade.partition("=")
    if name == "steps" and value.isdecimal() and int(value) > 1:
        # no divisor of the steps, see experiments/claim
        shorter = ["--trainer.max_steps", value, "--trainer.val_check_interval", str(int(value) // 2 + 1)]
        return {"flow_matching": shorter, "meanflow": []}
    try:
        name = name if math.isfinite(float(value)) and float(value) >= 0 else ""
    except ValueError:
        name = ""
    if name not in ("noise", "shared"):
        raise ValueError(
            f"grades: {grade!r} is none; give noise=NUMBER, shared=NUMBER, or steps=NUMBER, of the parent, e.g. noise=2"
        )
    option = [f"--data.text.init_args.{name}", value]
    return {"flow_matching": option, "meanflow": option}


def _final_scores(run: Path) -> dict[int, float]:
    """Network steps -> score at the end of a training; empty for an unfinished one."""
    history = ScoreHistory.read_if_there(run / "shapes" / SCORES)
    final = [record for record in history.records if record.stage == "final" and record.sampling.is_main]
    scores = {record.sampling.steps: record.overall for record in final if record.overall is not None}
    return scores if {*FEW_STEPS, MANY_STEPS} <= scores.keys() else {}


def _measure_discriminability(run: Path, corpus: PairCorpus) -> Estimate:
    """Discriminability on ``corpus`` of the encoder that ``run`` was trained with."""
    config: dict[str, Any] = read_yaml(run / "config.yaml")
    encoder = build_part(config["data"]["text"], TextEncoder)
    return discriminability(pooled_features(encoder, corpus.captions), corpus, limits=False).score["raw"]
