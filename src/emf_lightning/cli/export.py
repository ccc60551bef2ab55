"""`emf export`: a run as a folder that diffusers loads."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from emf_lightning.cli.model_card import model_card
from emf_lightning.cli.parsing.builder import BuildingCLI
from emf_lightning.cli.parsing.emf_cli import LINKED_ARGUMENTS
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.pipeline import EMFPipeline, PipelinePart

_AUTOCAST = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}


def export(run: Path, out: Path, checkpoint: Path | None = None) -> None:
    """Write a trained model as a folder in diffusers' format, with a model card.

    EMFPipeline.from_pretrained(out) draws from it. The network and a published autoencoder lie there as safetensors;
    a text encoder from the hub stays a name and is downloaded where the folder is used, one from a folder is copied.

    Args:
        run: directory of the run, which holds its config.yaml.
        out: folder to write.
        checkpoint: which of its checkpoints; by default checkpoints/last.ckpt, with averaged weights where it has some.
    """
    config, weights = run / "config.yaml", checkpoint or run / "checkpoints" / "last.ckpt"
    if not config.is_file():
        raise ValueError(f"run: no config.yaml in {run}; give the directory of a run, e.g. runs/shapes/emf/version_0")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} is there already; give a folder that is not, or empty it")
    built = BuildingCLI.run(["fit", "--config", str(config), "--model.init_args.init_from", str(weights)])
    if built.model.tunes_encoder:
        raise ValueError("run: its encoder lies in its folder encoder/; export a run that was adapted with it")
    pipeline = pipeline_of(built.model, built.datamodule, built.settings)
    pipeline.save_pretrained(str(out))
    for figure in sorted(run.glob("*/*.png")):
        shutil.copy(figure, out / f"{figure.parent.name}_{figure.name}")
    (out / "README.md").write_text(model_card(run, out, built.settings, pipeline))
    print(f"{out}: EMFPipeline.from_pretrained({str(out)!r})")


def pipeline_of(module: FlowMapModule, data: CaptionImageData, settings: Namespace) -> EMFPipeline:
    """The pipeline that generates the same images as ``module`` in `emf predict`.

    Args:
        module: with its weights.
        data: of the same experiment.
        settings: the experiment's configuration.
    """
    net = _spec(settings.model.init_args.net)
    known = inspect.signature(type(module.net)).parameters
    net["init_args"] |= {name: getattr(data, name) for name in LINKED_ARGUMENTS if name in known}
    return EMFPipeline(
        PipelinePart(module.net.eval(), net),
        PipelinePart(data.autoencoder, _spec(settings.data.autoencoder)),
        PipelinePart(data.text, _spec(settings.data.text)),
        sampler=spec_of(module.objective.sampler),
        guidance=spec_of(module.objective.sampling_guidance),
        guidance_scale=module.guidance_scale,
        latent_size=data.latent_size,
        autocast=_AUTOCAST.get(str(settings.trainer.precision)),
        features=data.cache.dtype if data.cache is not None else None,
    )


def _spec(part: Namespace) -> dict[str, Any]:
    spec = part.as_dict()
    return {"class_path": spec["class_path"], "init_args": dict(spec.get("init_args") or {})}


def spec_of(settings: Any) -> dict[str, Any]:
    """The class of a dataclass and its fields."""
    kind = type(settings)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": asdict(settings)}
