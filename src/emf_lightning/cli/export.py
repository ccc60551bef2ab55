"""`emf export`: a run as a folder that diffusers loads."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from emf_lightning.files import replacing_folder
from emf_lightning.part_classes import FLAG, plain, takes


def export(
    run: Path,
    out: Path,
    checkpoint: Path | None = None,
    parent: str | None = None,
    push: str | None = None,
    license: str | None = None,
    merge: bool = False,
) -> None:
    """Write a trained model as a folder in diffusers' format, with a model card.

    EMFPipeline.from_pretrained(out) loads it. The folder holds the network and a published autoencoder as safetensors;
    a text encoder from the hub stays a name, which loading downloads, and one from a folder is copied. app.py is the
    page of `emf play`, also for a Gradio Space.

    Args:
        run: its directory, runs/<name> for its newest version, or one of its checkpoints.
        out: folder to write.
        checkpoint: which of its checkpoints, by name or path; by default the last, its averaged weights if it has some.
        parent: exported folder of the model that the run started from, or its name on the hub, for app.py to show
            beside this one.
        push: repository of the hub, owner/name, to which the folder is uploaded; it is made if it is not there.
        license: of the model, for its card: an identifier of the hub, e.g. apache-2.0. By default the card names none.
        merge: add the adapters that the run trained to their parent's weights, so that the folder holds the whole
            network; by default it holds the adapters and the parent's name.
    """
    from emf_lightning.cli.load_run import build_run  # here: the help needs none of them
    from emf_lightning.cli.model_card import model_card
    from emf_lightning.cli.parsing.emf_cli import LINKED_ARGUMENTS
    from emf_lightning.cli.played_run import example_prompts
    from emf_lightning.cli.runs import checkpoint_of, find_run
    from emf_lightning.cli.saved_pipeline import check_saved
    from emf_lightning.exported_files import INDEX, own_modules
    from emf_lightning.hub import check_pushing, pushed
    from emf_lightning.modules.checkpoint import read_checkpoint
    from emf_lightning.modules.checkpoint_files import whole_checkpoint
    from emf_lightning.modules.generation import pipeline_of
    from emf_lightning.play import APP, PROMPTS

    if push is not None:
        check_pushing(push)
    beside = "" if parent is None else f", parent={_parent(parent, out)}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} is there already; give a folder that is not, or empty it")
    found = find_run(run)
    weights = whole_checkpoint(checkpoint_of(found, checkpoint))
    run, built = found.directory, build_run(found.directory, weights)
    settings, data, module = built.settings, built.datamodule, built.model.eval()
    _settle_adapters(module.net, merge, push)
    net = _spec(settings.model.init_args.net)
    linked = [name for name in LINKED_ARGUMENTS if takes(type(module.net), name)]
    net["init_args"] |= {name: getattr(data, name) for name in linked}
    specs = {"net": net, "autoencoder": _spec(settings.data.autoencoder), "text": _spec(settings.data.text)}
    pipeline = pipeline_of(module, data, str(settings.trainer.precision), specs)
    with replacing_folder(out) as partial:
        pipeline.save_pretrained(str(partial))
        check_saved(pipeline, partial)
        for figure in _figures(run):
            shutil.copy(figure, partial / f"{figure.parent.name}_{figure.name}")
        prompts = example_prompts(run, settings)
        if prompts:
            (partial / PROMPTS).write_text("\n".join(prompts) + "\n", encoding="utf-8")
        own = own_modules(partial)
        trust = f", {FLAG}=True" if own else ""
        (partial / "app.py").write_text(APP.format(options=f"{trust}{beside}"), encoding="utf-8")
        figures, name = sorted(partial.glob("*.png")), push or out.resolve().name
        step = int(read_checkpoint(weights, "checkpoint").get("global_step", settings.trainer.max_steps))
        source = None if parent is None or (Path(parent) / INDEX).is_file() else parent
        card = model_card(run, name, figures, settings, pipeline, prompts, license, source, step=step, modules=own)
        (partial / "README.md").write_text(card, encoding="utf-8")
    print(f"{out}: EMFPipeline.from_pretrained({str(out)!r}{trust})")
    if push is not None:
        print(f"{pushed(out, push)}: EMFPipeline.from_pretrained({push!r}{trust})")


def _figures(run: Path) -> list[Path]:
    """The run's figures and contact sheets, not the images that `emf predict` has written beside them."""
    from emf_lightning.evaluation.folders.image_folder import PROMPTS

    return [figure for figure in sorted(run.glob("*/*.png")) if not (figure.parent / PROMPTS).is_file()]


def _settle_adapters(net: Any, merge: bool, push: str | None) -> None:
    """Merges adapters on request; ValueError where there are none, or where nobody could load them from the hub."""
    adapted = getattr(net, "adapter", None) is not None
    if merge and not adapted:
        raise ValueError("merge: the run trained a whole network, without adapters; leave it out")
    if merge:
        net.merge_adapters()
    elif adapted and push is not None and Path(net.parent.path).exists():
        raise ValueError(
            f"push: the run trained adapters on {net.parent}, a folder of this machine, where nobody else finds the "
            "parent; add --merge"
        )


def _parent(parent: str, out: Path) -> str:
    """Python code of a parent's name on the hub, or of its path from ``out``; ValueError for neither."""
    from emf_lightning.exported_files import INDEX

    if (Path(parent) / INDEX).is_file():
        return f"Path(__file__).parent / {os.path.relpath(Path(parent).resolve(), out.resolve())!r}"
    if Path(parent).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", parent):
        raise ValueError(
            f"parent: {parent} is no exported folder, and no name of the hub; export the parent's run first"
        )
    return repr(parent)


def _spec(part: Namespace) -> dict[str, Any]:
    return {"class_path": part.class_path, "init_args": plain(part.get("init_args") or {})}
