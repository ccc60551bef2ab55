"""`emf claim`: the same network trained on encoders of graded quality, and whether few steps suffer more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from emf_lightning.callbacks.few_step_sampling import SCORES
from emf_lightning.callbacks.score_history import ScoreHistory
from emf_lightning.evaluation.claim import FEW, MANY, Claim, ClaimRun
from emf_lightning.evaluation.encoder_study import Estimate, discriminability, pooled_features
from emf_lightning.evaluation.pair_corpus import PairCorpus, ShapesPairs
from emf_lightning.text import degraded, words  # noqa: F401  what the experiments name
from emf_lightning.text.base import TextEncoder

GRADES = ("noise=0", "noise=0.5", "noise=1", "noise=2", "shared=3")
"""From .44 to .22 of discriminability, and a control: as discriminative as the best, its features nearly parallel."""


def claim(
    grades: list[str] | None = None,
    seeds: list[int] | None = None,
    out: Path = Path("runs/claim"),
    flow_matching: Path = Path("experiments/claim/flow_matching.yaml"),
    meanflow: Path = Path("experiments/claim/meanflow.yaml"),
    options: list[str] | None = None,
    pairs: int = 3000,
    train: bool = True,
) -> None:
    """Train on encoders of graded quality by flow matching, then MeanFlow, and compare what few steps keep.

    A call that was interrupted is repeated: finished trainings are kept, unfinished ones go on. Half an hour for each
    grade and seed on two cores.

    Args:
        grades: settings of DegradedEncoder, the scale by noise, controls by shared; five by default.
        seeds: of the trainings; 0, 1 and 2 by default.
        out: directory of all trainings, and for claim.md, claim.json and claim.png.
        flow_matching: experiment of the parents.
        meanflow: experiment that adapts them.
        options: further options for all trainings, e.g. '["--trainer.max_steps", "100"]'.
        pairs: caption-image pairs that discriminability is measured on.
        train: false only looks at the trainings that are there.
    """
    chosen, numbers = grades or list(GRADES), seeds if seeds is not None else [0, 1, 2]
    settings = {grade: _setting(grade) for grade in chosen}
    for experiment in (flow_matching, meanflow):
        if not experiment.is_file():
            raise ValueError(f"no experiment {experiment}; run this from the repository, or name another")
    corpus, measured = ShapesPairs(count=pairs), dict[str, Estimate]()
    runs = []
    for seed in numbers:  # a whole scale after the other, so that there is something to see early
        for grade in chosen:
            parent, adapted = (out / f"{grade}-seed{seed}-{kind}" for kind in ("flow_matching", "meanflow"))
            common = [*settings[grade], "--seed_everything", str(seed), *(options or [])]
            if train:
                _fit(flow_matching, parent, common)
                start = ["--model.init_args.net.init_args.pretrained", str(parent / "network")]
                _fit(meanflow, adapted, [*common, *start])
            scores = [_final_scores(run) for run in (parent, adapted)]
            if not all(scores):
                continue
            if grade not in measured:
                measured[grade] = _measure(parent, corpus)
            runs.append(ClaimRun(grade, grade.startswith("noise"), seed, measured[grade], scores[0], scores[1]))
            Claim(tuple(runs)).write(out)
    if not runs:
        raise ValueError(f"out: no finished trainings in {out}; leave out --train false")
    print(Claim(tuple(runs)).markdown())
    print(f"claim.md, claim.json and claim.png: {out}")


def _setting(grade: str) -> list[str]:
    """The options that a grade stands for."""
    name, _, value = grade.partition("=")
    try:
        float(value)
    except ValueError:
        name = ""
    if name not in ("noise", "shared"):
        raise ValueError(f"grades: {grade!r} is none; give noise=NUMBER or shared=NUMBER, e.g. noise=2")
    return [f"--data.text.init_args.{name}", value]


def _fit(experiment: Path, run: Path, options: list[str]) -> None:
    """Trains ``experiment`` into the directory ``run``, from its last checkpoint on where it has one."""
    if _final_scores(run):
        return
    place = []
    for name, value in (("save_dir", run.parent.parent), ("name", run.parent.name), ("version", run.name)):
        place += [f"--trainer.logger.init_args.{name}", str(value)]
    last = run / "checkpoints/last.ckpt"
    resume = ["--ckpt_path", str(last)] if last.is_file() else []
    command = [sys.executable, "-m", "emf_lightning", "fit", "--config", str(experiment), *place, *options, *resume]
    if subprocess.run(command, check=False, env=os.environ).returncode:
        raise ValueError(f"the training in {run} failed, see above; `{' '.join(command)}` repeats it")


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
