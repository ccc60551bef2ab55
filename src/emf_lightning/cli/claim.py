"""`emf claim`: the same network trained on encoders of graded quality, and whether few steps suffer more."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from emf_lightning.callbacks.few_step_sampling import SCORES
from emf_lightning.callbacks.score_history import ScoreHistory
from emf_lightning.cli.parsing.experiment_files import config_files, without_base
from emf_lightning.cli.trainings import fit, side_by_side
from emf_lightning.evaluation.encoders.claim import FEW, MANY, Claim, ClaimRun
from emf_lightning.evaluation.encoders.pair_corpus import PairCorpus, ShapesPairs
from emf_lightning.evaluation.encoders.study import Estimate, discriminability, pooled_features
from emf_lightning.text import degraded, words  # noqa: F401  what the experiments name
from emf_lightning.text.base import TextEncoder

GRADES = ("noise=0", "noise=1", "noise=2", "shared=3", "steps=1200")
"""From .44 to .21 of discriminability, and two controls as discriminative as the best.

One's features are nearly parallel; the other's parent is trained for fewer steps, to score as one of poor features.
"""
TRAINED = "trained.yaml"
"""What all trainings of a folder have in common."""


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
    """Train on encoders of graded quality by flow matching, then MeanFlow, and compare what few steps keep.

    A call that was interrupted is repeated: finished trainings are kept, unfinished ones go on. A quarter of an
    hour for each grade and seed on two cores.

    Args:
        grades: settings of DegradedEncoder, the scale by noise, controls by shared; and controls by steps, of the
            parent, with the encoder as it is; five by default.
        seeds: of the trainings; 0, 1 and 2 by default.
        out: directory of all trainings, and for claim.md, claim.json and claim.png.
        flow_matching: experiment of the parents.
        meanflow: experiment that adapts them.
        options: further options for all trainings, e.g. '["--trainer.max_steps", "100"]'.
        pairs: caption-image pairs that discriminability is measured on.
        jobs: trainings at the same time, each with its share of the CPU's threads.
        train: false only looks at the trainings that are there.
    """
    chosen, numbers = grades or list(GRADES), seeds if seeds is not None else [0, 1, 2]
    settings = {grade: _settings(grade) for grade in chosen}
    for experiment in (flow_matching, meanflow):
        if not experiment.is_file():
            raise ValueError(f"no experiment {experiment}; run this from the repository, or name another")
    corpus, measured = ShapesPairs(count=pairs), dict[str, Estimate]()
    kinds = {"flow_matching": flow_matching, "meanflow": meanflow}
    if train:
        _same_budget(out, list(kinds.values()), options or [])
    trainings = {  # a whole scale after the other, so that there is something to see early
        (seed, grade): {kind: out / f"{grade}-seed{seed}-{kind}" for kind in kinds}
        for seed in numbers
        for grade in chosen
    }

    def train_both(seed: int, grade: str) -> None:
        start: list[str] = []
        for kind, folder in trainings[seed, grade].items():
            if not _final_scores(folder):
                common = [*settings[grade][kind], "--seed_everything", str(seed), *(options or [])]
                fit(["--config", str(kinds[kind]), *_place(folder), *common, *start], folder, jobs)
            start = ["--model.init_args.net.init_args.pretrained", str(folder / "network")]

    def finished() -> tuple[ClaimRun, ...]:
        runs = []
        for (seed, grade), folders in trainings.items():
            scores = [_final_scores(folder) for folder in folders.values()]
            if all(scores):
                if grade not in measured:
                    measured[grade] = _measure(folders["meanflow"], corpus)
                runs.append(ClaimRun(grade, grade.startswith("noise"), seed, measured[grade], scores[0], scores[1]))
        return tuple(runs)

    for _ in side_by_side([partial(train_both, *key) for key in trainings] if train else [], jobs):
        if so_far := finished():
            Claim(so_far).write(out)
    found = Claim(finished())
    if not found.runs:
        raise ValueError(f"out: no finished trainings in {out}; leave out --train false")
    found.write(out)
    print(found.markdown())
    print(f"claim.md, claim.json and claim.png: {out}")


def _same_budget(out: Path, experiments: Sequence[Path], options: list[str]) -> None:
    """Raises where ``out`` holds trainings by other settings than these, which no table may mix."""
    files = [file for experiment in experiments for file in config_files(experiment)]
    settings = [*(yaml.safe_load(without_base(file.read_text())) for file in files), options]
    asked, record = yaml.safe_dump(settings, sort_keys=False), out / TRAINED
    if record.is_file() and record.read_text() != asked:
        raise ValueError(f"out: the trainings in {out} are of other settings, see {record}; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(asked)


def _settings(grade: str) -> dict[str, list[str]]:
    """The options that a grade stands for, of the parent's training and of the model's."""
    name, _, value = grade.partition("=")
    if name == "steps" and value.isdigit() and int(value) > 1:
        # no divisor, see experiments/claim
        shorter = ["--trainer.max_steps", value, "--trainer.val_check_interval", str(int(value) // 2 + 1)]
        return {"flow_matching": shorter, "meanflow": []}
    try:
        float(value)
    except ValueError:
        name = ""
    if name not in ("noise", "shared"):
        raise ValueError(
            f"grades: {grade!r} is none; give noise=NUMBER, shared=NUMBER, or steps=NUMBER, of the parent, e.g. noise=2"
        )
    option = [f"--data.text.init_args.{name}", value]
    return {"flow_matching": option, "meanflow": option}


def _place(run: Path) -> list[str]:
    """The options by which a training writes into the directory ``run``."""
    place = {"save_dir": run.parent.parent, "name": run.parent.name, "version": run.name}
    return [f"--trainer.logger.init_args.{name}={value}" for name, value in place.items()]


def _final_scores(run: Path) -> dict[int, float]:
    """Network steps -> score at the end of a finished training; empty where it is not finished."""
    history = ScoreHistory.read_if_there(run / "shapes" / SCORES)
    scores = {r.steps: r.scores.overall for r in history.records if r.stage == "final" and r.label == f"{r.steps}step"}
    return scores if {*FEW, MANY} <= scores.keys() else {}


def _measure(run: Path, corpus: PairCorpus) -> Estimate:
    """The discriminability on ``corpus`` of the encoder that ``run`` was trained on."""
    config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextEncoder, "text")
    encoder: TextEncoder = parser.instantiate(parser.parse_object({"text": config["data"]["text"]})).text
    return discriminability(pooled_features(encoder, corpus.captions), corpus, limits=False).score["raw"]
