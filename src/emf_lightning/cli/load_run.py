"""A run from Python: its module, ready to sample."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities.seed import isolate_rng

from emf_lightning.cli.parsing.builder import BuildingCLI
from emf_lightning.cli.parsing.experiment_files import expand
from emf_lightning.cli.parsing.own_classes import find_own_classes
from emf_lightning.cli.runs import CONFIG, checkpoint_of, find_run
from emf_lightning.modules.checkpoint_files import whole_checkpoint
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.generation import pipeline_of
from emf_lightning.part_classes import trusted, trusting


def build_run(run: str | Path, checkpoint: str | Path | None = None, trust_remote_code: bool = False) -> BuildingCLI:
    """The model with its weights, the data and the configuration of a run; arguments as for ``load_run``.

    Raises:
        ValueError: for a folder that is no run, a missing checkpoint, or a run that trained its text encoder.
    """
    found = find_run(run)
    config, weights = found.directory / CONFIG, checkpoint_of(found, checkpoint)
    options = ["--seed_everything", "false", "--model.init_args.init_from", str(whole_checkpoint(weights))]
    trust = trusted() or trust_remote_code
    if trust:
        find_own_classes([str(config)])
    with trusting(trust), isolate_rng():  # the network's initial weights are random
        built = BuildingCLI.run(expand(["fit", "--config", str(config), *options]))
    if built.model.tunes_encoder:
        raise ValueError("run: its encoder lies in its folder encoder/; give a run that was adapted with it")
    return built


def load_run(
    run: str | Path, checkpoint: str | Path | None = None, *, device: str = "cpu", trust_remote_code: bool = False
) -> FlowMapModule:
    """The trained module of a run, in eval mode, whose ``sample`` generates images of prompts.

    The images are those of ``emf predict``. Relative paths in the run's config.yaml start from the current directory.

    Args:
        run: its directory, ``runs/<name>`` for its newest version, or one of its checkpoints.
        checkpoint: which of its checkpoints, by name or path; by default the last, its averaged weights if it has some.
        device: of all parts, e.g. ``cuda``.
        trust_remote_code: whether the run's config.yaml may name classes of your own: building those runs code.

    Raises:
        ValueError: for a folder that is no run, a missing checkpoint, or a class that is not trusted.

    Example:
        >>> model = load_run("runs/shapes/demo/version_0")
        >>> model.sample(["a photo of a red circle"], steps=1)[0].size
        (36, 36)
    """
    built = build_run(run, checkpoint, trust_remote_code)
    module: FlowMapModule = built.model.eval()
    pipeline = pipeline_of(module, built.datamodule, str(built.settings.trainer.precision))
    pipeline.set_progress_bar_config(disable=True)
    module.pipeline = pipeline.to(device)
    return module
