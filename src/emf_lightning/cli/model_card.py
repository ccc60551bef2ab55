"""The README.md beside an exported model."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from emf_lightning.callbacks.score_history import ScoreHistory
from emf_lightning.pipeline import EMFPipeline

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [emf_lightning, few-step, meanflow]
---
# {title}

A text-to-image model that draws in 1, 2 or 4 network steps, trained with emf_lightning.

```python
from emf_lightning.pipeline import EMFPipeline

pipe = EMFPipeline.from_pretrained("{folder}")  # .to("cuda"), or pipe.enable_model_cpu_offload()
pipe(["a red circle"], num_inference_steps=1, seed=0).images[0]
```

`num_inference_steps` is what it was trained to make small; `guidance_scale` other than 1 doubles the evaluations; the
noise belongs to `seed` and the prompt: a prompt's picture is the same in any batch. `transformer/` and, where it is a
published autoencoder, `vae/` are in diffusers' own format.

## What it is
| | |
|---|---|
{facts}

## Scores
{scores}
{figures}"""


def model_card(run: Path, out: Path, settings: Namespace, pipeline: EMFPipeline) -> str:
    """The card: how to draw, what was trained, and the last scores and the curves of ``run``.

    Args:
        run: its directory.
        out: the exported folder, which holds the run's figures.
        settings: the run's configuration.
        pipeline: what was exported.
    """
    net = settings.model.init_args.net
    source = net.get("init_args.pretrained") or settings.model.init_args.get("init_from")
    logger = settings.trainer.get("logger")
    name = logger.get("init_args.name") if isinstance(logger, Namespace) else None
    trained = settings.model.get("init_args.objective.class_path") or settings.model.class_path
    facts = {
        "experiment": name or run.name,
        "objective": trained.rpartition(".")[2],
        "started from": getattr(source, "path", source) or "nothing",
        "parameters": f"{sum(p.numel() for p in pipeline.transformer.part.parameters()):,} (network)",
        "text encoder": _described(settings.data.text),
        "latents": _described(settings.data.autoencoder) + f", {pipeline.config.latent_size} positions a side",
        "resolution": f"{settings.data.resolution} px",
        "optimiser steps": settings.trainer.max_steps,
        "guidance when drawing": settings.model.init_args.get("guidance", 1.0),
        "seed": settings.seed_everything,
    }
    return _CARD.format(
        title=facts["experiment"],
        folder=out.name,
        facts="\n".join(f"| {what} | {value} |" for what, value in facts.items()),
        scores=_scores(run),
        figures="".join(f"\n![{figure.stem}]({figure.name})\n" for figure in sorted(out.glob("*.png"))),
    )


def _described(part: Namespace) -> str:
    name = part.get("init_args.model") or part.get("init_args.pretrained")
    return part.class_path.rpartition(".")[2] + (f" ({name})" if name else "")


def _scores(run: Path) -> str:
    histories = {path.parent.name: ScoreHistory.read_if_there(path) for path in sorted(run.glob("*/scores.jsonl"))}
    rows = [
        f"| {suite} | {record.steps} | {record.nfe} | {record.guidance:g} | {record.scores.overall:.3f} "
        f"± {record.scores.standard_error:.3f} | {record.stage}, step {record.step:,} |"
        for suite, history in histories.items()
        for record in history.latest()
    ]
    if not rows:
        return "None were taken in this run.\n"
    head = "| suite | steps | evaluations | guidance | overall | taken |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"
