"""README.md of an exported model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jsonargparse import Namespace

from emf_lightning.cli.parsing.experiment_files import read_yaml
from emf_lightning.cli.parsing.experiment_loggers import experiment_name
from emf_lightning.cli.runs import CONFIG, run_of
from emf_lightning.evaluation.markdown import markdown_table
from emf_lightning.evaluation.score_history import ScoreHistory
from emf_lightning.part_classes import FLAG
from emf_lightning.pipeline import EMFPipeline
from emf_lightning.remote_code import INSTALL

_CARD = """\
---
{head}
---
# {title}

A text-to-image model{few}, trained with emf_lightning.

```python
from emf_lightning import EMFPipeline

pipe = EMFPipeline.from_pretrained("{name}"{trust}).to("cuda")  # or pipe.enable_model_cpu_offload()
pipe({prompt}, num_inference_steps={steps}, seed=0).images[0]
```
{own}
Stock diffusers loads the same class through the code in this repository, `pipeline.py`. It imports the package
emf_lightning, which has to be installed (`{install}`):

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
```

The model was trained for {trained} `num_inference_steps`; a `guidance_scale` other than 1 doubles the evaluations,
unless the network takes guidance as a condition. `seed` and prompt fix the noise, so that a prompt's image is the same
in any batch. `python app.py` shows the model as a web page (`pip install 'emf_lightning[play]'`).
{stock}
## Training
{facts}

## Scores
{scores}
{figures}"""
_OWN = """
The model is of classes in {modules}, which this repository does not hold: put their files where Python finds them.
"""
_STOCK = """
`transformer/` is in diffusers' format. The stock class {kind} loads it without its second time, and computes something
else: take the pipeline.
"""
_ADAPTED = """
`transformer/` holds LoRA adapters and what trained beside them, and loading downloads the parent. The parent's stock
pipeline reads the adapters alone, without the second time:
`pipe.load_lora_weights("{name}", subfolder="transformer", weight_name="pytorch_lora_weights.safetensors")`.
"""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    run: Path,
    name: str,
    figures: Sequence[Path],
    settings: Namespace,
    pipeline: EMFPipeline,
    prompts: Sequence[str] = (),
    license: str | None = None,
    parent: str | None = None,
    *,
    step: int,
    modules: Sequence[str] = (),
) -> str:
    """The model card: usage, training, last scores and ``figures``, which lie beside it; no local path is in it.

    Args:
        run: its directory.
        name: of the exported folder, or of the repository.
        figures: images in the folder.
        settings: the run's configuration.
        pipeline: the exported model.
        prompts: of the run, for the example.
        license: identifier of the hub, e.g. ``apache-2.0``.
        parent: name on the hub of the model that the run started from, where its configuration names none.
        step: optimiser steps of the exported checkpoint.
        modules: those outside this package with classes of the model.
    """
    net = settings.model.init_args.net
    config = read_yaml(run / CONFIG)  # an export starts from the exported checkpoint, and with no seed
    started = _parent(config, net)
    trained = settings.model.get("init_args.objective.class_path") or settings.model.class_path
    title = experiment_name(settings.trainer) or run.name
    few = trained.rpartition(".")[2] != "FlowMatching"
    data = _data_sets(settings.data.get("shards"))
    base = next((one for one in (parent, started) if one and _on_hub(one)), None)
    head = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["emf_lightning", *(["few-step", "meanflow"] if few else ["flow-matching"])],
        license=license,
        base_model=base,
        datasets=[one for one in data if _is_hub_data_set(one)] or None,
        model_name=title,
        eval_results=_results(run, step) or None,
        sdk="gradio",
        app_file="app.py",
    )
    facts = {
        "experiment": title,
        "objective": trained.rpartition(".")[2],
        "started from": base or (public_name(started) if started else "nothing"),
        "training data": ", ".join(one if _is_hub_data_set(one) else Path(one).name for one in data) or "none",
        "parameters": f"{sum(p.numel() for p in pipeline.transformer.part.parameters()):,} (network)",
        "text encoder": _description(settings.data.text),
        "latents": _description(settings.data.autoencoder) + f", {pipeline.config.latent_size} positions a side",
        "resolution": f"{settings.data.resolution} px",
        "optimiser steps": f"{step:,}",
        "guidance scale": settings.model.init_args.get("guidance_scale", 1.0),
        "seed": config.get("seed_everything"),
    }
    own = pipeline.transformer.part
    kinds = type(own.diffusers_model).__mro__ if own.takes_interval and hasattr(own, "diffusers_model") else ()
    stock = next((kind.__name__ for kind in kinds if kind.__module__.startswith("diffusers.")), None)
    remark = "" if stock is None else _STOCK.format(kind=stock)
    if getattr(own, "adapter", None) is not None:
        remark = _ADAPTED.format(name=name)
    return _CARD.format(
        head=head.to_yaml().strip(),
        few=" that samples in 1, 2 or 4 network steps" if few else " that samples in some 30 network steps",
        steps=1 if few else 30,
        trained="few" if few else "some 30",
        title=title,
        name=name,
        trust=f", {FLAG}=True" if modules else "",
        own=_OWN.format(modules=", ".join(f"`{module}`" for module in modules)) if modules else "",
        install=INSTALL,
        prompt=repr(prompts[0] if prompts else ""),
        stock=remark,
        facts=markdown_table(["", ""], [[key, str(value)] for key, value in facts.items()]),
        scores=_scores(run, step),
        figures="".join(f"\n![{figure.stem}]({figure.name})\n" for figure in figures),
    )


def public_name(name: str) -> str:
    """A name on the hub as it is; of a run's checkpoint the run, of another path the last part."""
    if _on_hub(name):
        return name
    run = run_of(name) if Path(name).exists() else None
    return Path(name).name if run is None else f"{Path(name).name} of the run {run.parent.name}/{run.name}"


def _on_hub(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists() and not name.endswith(".ckpt")


def _is_hub_data_set(name: str) -> bool:
    """Whether a data set is of the hub, whose cache then has its card; the folder of another may be gone by now."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return _on_hub(name) and (Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}").is_dir()


def _parent(config: dict[str, Any], net: Namespace) -> str | None:
    """What the training started from."""
    start = (config["model"].get("init_args") or {}).get("init_from")
    source = start or net.get("init_args.pretrained")
    return str(getattr(source, "path", source)) if source else None


def _data_sets(shards: Any) -> list[str]:
    """Names of the data sets or files of ``data.shards``."""
    listed = shards if isinstance(shards, list) else [shards] if shards else []
    return [one if isinstance(one, str) else str(one.name) for one in listed]


def _description(part: Namespace) -> str:
    name = part.get("init_args.model") or part.get("init_args.pretrained")
    return part.class_path.rpartition(".")[2] + (f" ({public_name(str(getattr(name, 'path', name)))})" if name else "")


def _results(run: Path, step: int) -> list[EvalResult]:
    """The scores of ``step`` as the hub's model index has them, which names no step."""
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=record.suite,
            dataset_name=record.suite,
            metric_type=name,
            metric_name=f"{found.heading} (steps {record.sampling.steps}, guidance {record.sampling.guidance_scale:g})",
            metric_value=round(float(found.score), 6),
        )
        for path in sorted(run.glob("*/scores.jsonl"))
        for record in ScoreHistory([r for r in ScoreHistory.read_if_there(path).records if r.step == step]).latest()
        for name, found in record.results.items()
        if math.isfinite(found.score)
    ]


def _scores(run: Path, step: int) -> str:
    """A table of the last scores up to ``step``."""
    rows = []
    for path in sorted(run.glob("*/scores.jsonl")):
        records = ScoreHistory.read_if_there(path).records
        for record in ScoreHistory([record for record in records if record.step <= step]).latest():
            sampling, stage = record.sampling, f"{record.stage}, step {record.step:,}"
            for name, found in record.results.items():
                metric = name if name == record.suite else f"{found.heading} (images of {record.suite})"
                row = [metric, str(sampling.steps), str(record.nfe), f"{sampling.guidance_scale:g}"]
                error = "" if math.isnan(found.error) else f" ± {found.of({'score': found.error}).text()}"
                rows.append([*row, found.text() + error, stage])
    if not rows:
        return "This run has no scores.\n"
    return markdown_table(["metric", "steps", "NFE", "guidance scale", "score", "stage"], rows) + "\n"
