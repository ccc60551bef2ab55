"""The model of a run, as the page of `emf play` shows it."""

from __future__ import annotations

from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from emf_lightning.cli.load_run import build_run
from emf_lightning.cli.parsing.builder import BuildingCLI
from emf_lightning.cli.parsing.experiment_files import expand, read_yaml
from emf_lightning.cli.parsing.experiment_loggers import experiment_name
from emf_lightning.cli.runs import CONFIG, checkpoint_of, find_run, run_of
from emf_lightning.cli.shipped import with_shipped_files
from emf_lightning.data.prompt_list import PromptList
from emf_lightning.evaluation.score_history import ScoreHistory
from emf_lightning.flow.guidance import ClassifierFreeGuidance
from emf_lightning.flow.sampling import EulerSampler
from emf_lightning.modules.checkpoint import load_network
from emf_lightning.modules.checkpoint_files import whole_checkpoint
from emf_lightning.modules.generation import pipeline_of
from emf_lightning.modules.joint_distillation import JointDistillation
from emf_lightning.part_classes import spec_of
from emf_lightning.pipeline import EMFPipeline
from emf_lightning.pipeline_part import PipelinePart
from emf_lightning.play import PlayedModel
from emf_lightning.text.plain import parse_json, shorten

_EXAMPLES = 6
"""Prompts that the page offers."""


def run_model(run: Path, checkpoint: Path | None = None) -> PlayedModel:
    """The model of a run, and its parent where the run started from one that can be loaded."""
    found = find_run(run)
    weights = whole_checkpoint(checkpoint_of(found, checkpoint))
    try:  # the experiment as it began: its network is the parent
        built = BuildingCLI.run(expand(["fit", "--config", str(found.directory / CONFIG), "--seed_everything=false"]))
        if built.model.tunes_encoder:
            raise ValueError("the run trained its text encoder")
        teacher = getattr(built.model, "teacher", None)
        start, remark = deepcopy(built.model.net if teacher is None else teacher.net), ""
        load_network(built.model.net, str(weights))
    except ValueError as error:
        built, start = build_run(found.directory, weights), None
        remark = f"The parent is left out: {shorten(str(error), 200)}"
    settings = built.settings
    pipeline = pipeline_of(built.model.eval(), built.datamodule, str(settings.trainer.precision))
    name = experiment_name(settings.trainer) or found.directory.name
    prompts = example_prompts(found.directory, settings)
    source = settings.model.init_args.net.get("init_args.pretrained")
    if not isinstance(built.model, JointDistillation):  # its teacher is the network before init_from
        source = settings.model.init_args.get("init_from") or source
    if start is None or source is None:
        remark = remark or "The run started from no other model, so it has no parent."
        return PlayedModel(name, pipeline, prompts, remark=remark)
    source = with_shipped_files(str(getattr(source, "path", source)))
    parent = EMFPipeline(
        transformer=PipelinePart(start.eval(), {}),
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        sampler=spec_of(EulerSampler()),  # the velocity u(z, t, t) alone: the second time is new to the parent
        guidance=spec_of(ClassifierFreeGuidance()),
        guidance_scale=_guidance_of(Path(source)),
        latent_size=pipeline.config.latent_size,
        autocast=pipeline.config.autocast,
        features=pipeline.config.features,
    )
    return PlayedModel(name, pipeline, prompts, parent, f"The parent is {source}.")


def example_prompts(directory: Path, settings: Namespace) -> list[str]:
    """Some prompts of a run: one of each task that it scored, or the first of its ``data.prompts``."""
    for file in sorted(directory.glob("*/results/*.jsonl")):
        with file.open(encoding="utf-8", errors="replace") as lines:
            rows = [_result(line) for line in islice(lines, 10_000)]
        found = {str(row.get("tag") or row["prompt"]): row["prompt"] for row in reversed(rows) if row.get("prompt")}
        if found:
            return list(found.values())[::-1][:_EXAMPLES]
    listed = settings.data.get("prompts")
    there = isinstance(listed, list) or (listed and Path(listed).expanduser().is_file())
    return list(PromptList(listed).prompts[:_EXAMPLES]) if listed and there else []


def _result(line: str) -> dict[str, Any]:
    """A row of a results file; empty for a damaged one, which has no prompt to show."""
    try:
        row = parse_json(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("prompt"), str) else {}


def _guidance_of(source: Path) -> float:
    """The guidance scale of the run in which ``source`` lies, or of the scores beside it; 1 where nothing says it."""
    run = run_of(source) if source.exists() else None
    if run is not None:
        settings = read_yaml(run / CONFIG)["model"].get("init_args", {})
        return float(settings.get("guidance_scale", 1.0))
    known = ScoreHistory.read_if_there(source / "scores.jsonl").latest()
    main = [record.sampling for record in known if record.sampling.is_main]
    return max(main, key=lambda sampling: sampling.steps).guidance_scale or 1.0 if main else 1.0
