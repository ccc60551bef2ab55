"""The options of a verb beside those of the trainer, the model and the data: `--run`, and those of `emf predict`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from emf_lightning.callbacks.sample_writer import SampleWriter
from emf_lightning.cli.parsing.parser_errors import class_of
from emf_lightning.cli.runs import checkpoint_of, find_run, run_of
from emf_lightning.data.prompt_list import PromptList

NONE = "none"
"""``--ckpt_path none``: the weights that the experiment starts from."""


@dataclass
class Chosen:
    """Checkpoint that a verb loads, and directory that it writes into.

    Attributes:
        checkpoint: its path, or ``last``; None where there is none.
        directory: the run to write into; None for a version of the experiment's own.
        step: of the checkpoint.
    """

    checkpoint: str | None
    directory: Path | None
    step: int = 0


def add_options(parser: LightningArgumentParser, verb: str) -> None:
    """Adds the options to the parser of ``verb``."""
    purpose = "go on with, in its directory" if verb == "fit" else f"{verb}; results lie in its directory"
    parser.add_argument(
        "--run",
        type=str,
        help=f"run to {purpose}: runs/NAME, its newest version, a version's folder, or a checkpoint in it",
    )
    if verb == "predict":
        parser.add_argument("--prompt", type=str, action="append", help="a prompt; may be repeated")
        parser.add_argument("--prompts", type=str, help="text file with one prompt a line")
        parser.add_argument("--steps", type=steps, help="network steps from noise to data, e.g. 1,2,4")
        parser.add_argument("--guidance_scale", type=scales, help="of classifier-free guidance, e.g. 1.5 or 1,2")
        parser.add_argument("--out", type=str, help="folder of the images; by default samples/ in the run's directory")


def steps(text: str | Sequence[int]) -> list[int]:
    """Whole numbers from ``1,2,4``."""
    return [int(word) for word in text.strip("[]").split(",")] if isinstance(text, str) else list(text)


def scales(text: str | float | Sequence[float]) -> list[float]:
    """Numbers from ``1.5`` or ``1,2``."""
    if isinstance(text, str):
        return [float(word) for word in text.strip("[]").split(",")]
    return [text] if isinstance(text, int | float) else list(text)


def choose(config: Namespace, fitting: bool, arguments: Sequence[str]) -> Chosen:
    """The checkpoint and the directory that ``config`` names; takes ``run`` out of it, which no run keeps.

    Raises:
        ValueError: where there is no checkpoint to evaluate, and nobody said that this is meant.
    """
    run, path = config.pop("run", None), config.get("ckpt_path")
    meant = path == NONE
    if meant:
        path = config["ckpt_path"] = None
    found = find_run(run) if run else None
    given = any(argument.partition("=")[0] == "--ckpt_path" for argument in arguments)
    if found and not given:  # the run's own config.yaml may name the one that it began with
        path = str(checkpoint_of(found))
    if fitting:
        return Chosen(path, found.directory if found else None)
    if not path and not meant and not config.trainer.fast_dev_run:
        raise ValueError(
            "no checkpoint is given, and the network is not trained: add --run RUN or --ckpt_path FILE; --ckpt_path "
            f"{NONE} takes the weights that the experiment starts from, published ones for example"
        )
    logger = config.trainer.get("logger")
    numbered = not isinstance(logger, Namespace) or logger.get("init_args.version") is None
    directory = found.directory if found else run_of(path) if path and numbered else None
    return Chosen(path, directory)


def set_prediction(config: Namespace) -> None:
    """Gives the options of `emf predict` to the data and to ``SampleWriter``, which is added where it is missing.

    Raises:
        ValueError: for no prompts.
    """
    given, file, folder = config.pop("prompt", None), config.pop("prompts", None), config.pop("out", None)
    if given or file:
        config.data.prompts = [*(given or ()), *(PromptList(file).prompts if file else ())]
    if not config.data.prompts:
        raise ValueError('prompts: none are given; add --prompt "a photo of a red circle", or --prompts FILE')
    options = {"steps": config.pop("steps", None), "guidance_scale": config.pop("guidance_scale", None)}
    options["folder"] = Path(folder).expanduser().absolute() if folder else None
    callbacks = config.trainer.callbacks or []
    writers = [callback for callback in callbacks if issubclass(class_of(callback.class_path), SampleWriter)]
    if not writers:
        path = f"{SampleWriter.__module__}.{SampleWriter.__name__}"
        writers = [Namespace(class_path=path, init_args=Namespace())]  # type: ignore[no-untyped-call]
        config.trainer.callbacks = [*callbacks, *writers]
    for writer in writers:
        for name, value in options.items():
            if value is not None:
                writer.init_args[name] = value
