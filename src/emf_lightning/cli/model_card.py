"""README.md of an exported model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from emf_lightning.cli.parsing.experiment_loggers import experiment_name
from emf_lightning.evaluation.markdown import markdown_table
from emf_lightning.evaluation.score_history import ScoreHistory
from emf_lightning.pipeline import EMFPipeline

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [emf_lightning, few-step, meanflow]
sdk: gradio
app_file: app.py
---
# {title}

A text-to-image model that samples in 1, 2 or 4 network steps, trained with emf_lightning.

```python
from emf_lightning.pipeline import EMFPipeline

pipe = EMFPipeline.from_pretrained("{folder}")  # .to("cuda"), or pipe.enable_model_cpu_offload()
pipe(["a red circle"], num_inference_steps=1, seed=0).images[0]
```

The model was trained for few `num_inference_steps`; a `guidance_scale` other than 1 doubles the evaluations. `seed` and
prompt fix the noise, so that a prompt's image is the same in any batch. `transformer/` and, of a published autoencoder,
`vae/` are in diffusers' format. `python app.py` shows the model as a web page (`pip install 'emf_lightning[play]'`).

## Training
{facts}

## Scores
{scores}
{figures}"""


def model_card(run: Path, folder: str, figures: Sequence[Path], settings: Namespace, pipeline: EMFPipeline) -> str:
    """The model card: usage, training, last scores and ``figures``, which lie beside it in ``folder``."""
    net = settings.model.init_args.net
    source = net.get("init_args.pretrained") or settings.model.init_args.get("init_from")
    trained = settings.model.get("init_args.objective.class_path") or settings.model.class_path
    facts = {
        "experiment": experiment_name(settings.trainer) or run.name,
        "objective": trained.rpartition(".")[2],
        "started from": getattr(source, "path", source) or "nothing",
        "parameters": f"{sum(p.numel() for p in pipeline.transformer.part.parameters()):,} (network)",
        "text encoder": _description(settings.data.text),
        "latents": _description(settings.data.autoencoder) + f", {pipeline.config.latent_size} positions a side",
        "resolution": f"{settings.data.resolution} px",
        "optimiser steps": settings.trainer.max_steps,
        "guidance scale": settings.model.init_args.get("guidance_scale", 1.0),
        "seed": settings.seed_everything,
    }
    return _CARD.format(
        title=facts["experiment"],
        folder=folder,
        facts=markdown_table(["", ""], [[name, str(value)] for name, value in facts.items()]),
        scores=_scores(run),
        figures="".join(f"\n![{figure.stem}]({figure.name})\n" for figure in figures),
    )


def _description(part: Namespace) -> str:
    name = part.get("init_args.model") or part.get("init_args.pretrained")
    return part.class_path.rpartition(".")[2] + (f" ({name})" if name else "")


def _scores(run: Path) -> str:
    rows = []
    for path in sorted(run.glob("*/scores.jsonl")):
        for record in ScoreHistory.read_if_there(path).latest():
            sampling, stage = record.sampling, f"{record.stage}, step {record.step:,}"
            for name, found in record.results.items():
                metric = name if name == record.suite else f"{found.heading} (images of {record.suite})"
                row = [metric, str(sampling.steps), str(record.nfe), f"{sampling.guidance_scale:g}"]
                error = "" if math.isnan(found.error) else f" ± {found.of({'score': found.error}).text()}"
                rows.append([*row, found.text() + error, stage])
    if not rows:
        return "This run has no scores.\n"
    return markdown_table(["metric", "steps", "NFE", "guidance scale", "score", "stage"], rows) + "\n"
