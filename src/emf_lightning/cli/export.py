"""`emf export`: a run as a folder that diffusers loads."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from emf_lightning.cli.load_run import build_run
from emf_lightning.cli.model_card import model_card
from emf_lightning.cli.parsing.emf_cli import LINKED_ARGUMENTS
from emf_lightning.modules.generation import pipeline_of


def export(run: Path, out: Path, checkpoint: Path | None = None) -> None:
    """Write a trained model as a folder in diffusers' format, with a model card.

    EMFPipeline.from_pretrained(out) loads it. The folder holds the network and a published autoencoder as safetensors;
    a text encoder from the hub stays a name, which loading downloads, and one from a folder is copied.

    Args:
        run: directory of the run, which holds its config.yaml.
        out: folder to write.
        checkpoint: which of its checkpoints; by default checkpoints/last.ckpt, with averaged weights if it has some.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} is there already; give a folder that is not, or empty it")
    built = build_run(run, checkpoint)
    settings, data, module = built.settings, built.datamodule, built.model.eval()
    net = _spec(settings.model.init_args.net)
    known = inspect.signature(type(module.net)).parameters
    net["init_args"] |= {name: getattr(data, name) for name in LINKED_ARGUMENTS if name in known}
    specs = {"net": net, "autoencoder": _spec(settings.data.autoencoder), "text": _spec(settings.data.text)}
    pipeline = pipeline_of(module, data, str(settings.trainer.precision), specs)
    pipeline.save_pretrained(str(out))
    pipeline.check_saved(out)
    for figure in sorted(run.glob("*/*.png")):
        shutil.copy(figure, out / f"{figure.parent.name}_{figure.name}")
    (out / "README.md").write_text(model_card(run, out, settings, pipeline))
    print(f"{out}: EMFPipeline.from_pretrained({str(out)!r})")


def _spec(part: Namespace) -> dict[str, Any]:
    spec = part.as_dict()
    return {"class_path": spec["class_path"], "init_args": dict(spec.get("init_args") or {})}
