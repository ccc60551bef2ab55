"""A run's own directory: claimed by one training at a time, and found again by one that goes on."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from jsonargparse import Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from emf_lightning.callbacks.loggers.run_directory import UNNAMED, file_loggers, place
from emf_lightning.cli.run_lock import LOCK, lock, process, read
from emf_lightning.cli.trainings import RUN_DIRECTORY

IDENTITY = (
    *("model.class_path", "model.init_args.objective.class_path", "model.init_args.net"),
    *("data.text", "data.autoencoder"),
)
"""Settings that runs share of which one can go on from the other; their learning rate and length may differ."""

_STARTED = (LOCK, "config.yaml", "hparams.yaml", "events.out.tfevents")
"""Beginnings of the names of the files that a start writes before it has any result."""


@dataclass
class OpenRun:
    """The directory of one call of a verb.

    Attributes:
        checkpoint: to load.
        directory: into which the call writes, on the first rank.
        lock: held by ``fit`` until it ends.
        created: the directory and those above it that this call has made.
    """

    checkpoint: str | None
    directory: Path | None = None
    lock: IO[str] | None = None
    created: Sequence[Path] = ()

    def close(self) -> None:
        """Lets other processes train here."""
        if self.lock is not None:
            self.lock.close()

    def remove_if_empty(self) -> None:
        """Removes what this call has made, unless there is a result in it: a file that no start writes."""
        own = self.directory
        if own in self.created and own is not None and all(_is_of_start(path, own) for path in own.rglob("*")):
            shutil.rmtree(own, ignore_errors=True)
            with suppress(OSError):  # another run is beside it
                for parent in self.created[1:]:
                    parent.rmdir()


def _is_of_start(path: Path, directory: Path) -> bool:
    within_wandb = path.relative_to(directory).parts[0] == "wandb"
    return path.is_dir() or within_wandb or path.name.startswith(_STARTED)


def open_run(trainer: Trainer, config: Namespace, fitting: bool, path: str | None, run: Path | None) -> OpenRun:
    """Gives ``fit`` a run directory of its own, which no other process trains in while its lock is held.

    A job that SLURM or torchrun starts again goes on in its directory, from its last checkpoint. So does
    ``--ckpt_path last``, in the newest directory of this experiment that has one.

    Args:
        trainer: whose logger gets its directory.
        config: of the verb.
        fitting: whether the verb is ``fit``; any other one writes beside the results of the run it evaluates.
        path: the checkpoint to load, if any.
        run: the directory to write into; by default the logger's, with the next free version.

    Raises:
        ValueError: for ``last`` without a checkpoint or of another experiment; for a directory that is in use.
    """
    first = getattr(rank_zero_only, "rank", 0) == 0  # the trainer does not know its rank yet
    root, own = _places(trainer, config, run)
    # an earlier run without a logger lies in the folder itself
    places = [own] if own is not None else [*versions(root), *([root] if (root / "checkpoints").is_dir() else [])]
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    before, directory = started_before(places, config) if fitting else None, None
    if before is not None:
        place(trainer, before)
        path = _newest_checkpoint(trainer) or path
    elif path == "last":
        for directory in places:
            place(trainer, directory)
            if path := _newest_checkpoint(trainer):
                break
        if not path or path == "last":
            raise ValueError(
                f"ckpt_path: no last checkpoint in {own or root}; leave --ckpt_path out "
                "to start anew, or give the path of a .ckpt"
            )
        assert directory is not None
        check_identity(directory, config)
    elif own is not None:
        place(trainer, own)
    elif first:
        place(trainer, root / f"version_{claim(root)}")
        missing.insert(0, Path(trainer.default_root_dir))
    if not first:  # the trainer takes the directory from the first rank
        return OpenRun(path)
    used = Path(trainer.default_root_dir)
    if not used.exists():
        missing.insert(0, used)
    return OpenRun(path, used, lock(used, record(config)) if fitting else None, missing)


def _places(trainer: Trainer, config: Namespace, run: Path | None) -> tuple[Path, Path | None]:
    """The folder of the run's versions, and the run's directory where the user names it.

    A ``TensorBoardLogger`` or ``CSVLogger`` with a name gives the folder, else ``trainer.default_root_dir``.
    """
    if given := os.environ.pop(RUN_DIRECTORY, run):
        return Path(given).parent, Path(given)
    files = file_loggers(trainer.loggers)
    by_logger = [logger for logger in files if logger.name != UNNAMED or config.trainer.default_root_dir is None]
    root = Path(by_logger[0].root_dir if by_logger else trainer.default_root_dir)
    version = files[0]._version if files else None
    if version is None:
        return root, None
    return root, root / (version if isinstance(version, str) else f"version_{version}")


def _newest_checkpoint(trainer: Trainer) -> str | None:
    """The newest last checkpoint where this run's are written."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    found = [path for callback in callbacks for path in callback._find_last_checkpoints(trainer)]
    return max(found, key=os.path.getmtime, default=None)


def identity(config: Namespace) -> str:
    """Digest of the settings ``IDENTITY``, without the weights that the network starts from."""
    values = {key: _plain(config.get(key)) for key in IDENTITY}
    net = values["model.init_args.net"]
    if isinstance(net, dict):
        net.get("init_args", {}).pop("pretrained", None)
    return _digest(values)


def record(config: Namespace) -> dict[str, Any]:
    """This process and its experiment, for a lock."""
    return process() | {"job": job(), "identity": identity(config), "config": _digest(_plain(config))}


def job() -> str | None:
    """Name of the SLURM job, or of torchrun's call, that keeps its name where it is started again."""
    torchrun, slurm = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("SLURM_JOB_ID")
    if torchrun not in (None, "none"):  # torchrun's name of a call without --rdzv-id
        return f"torchrun {torchrun}"
    if slurm is not None:
        return f"slurm {slurm}"
    if torchrun is None:
        return None
    machines = int(os.environ.get("GROUP_WORLD_SIZE") or 1)  # rank 0 may be on another one after a restart
    return f"torchrun on {machines} machines" if machines > 1 else f"torchrun {os.getppid()} on {socket.gethostname()}"


def is_restart() -> bool:
    """Whether SLURM or torchrun has started this job before."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def claim(root: Path) -> int:
    """Creates ``root/version_n`` with a number above all others, which no other process gets; returns the number."""
    root.mkdir(parents=True, exist_ok=True)
    number = max(map(_number, versions(root)), default=-1) + 1
    while True:
        try:
            (root / f"version_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return number


def versions(root: Path) -> Sequence[Path]:
    """The run directories ``root/version_n``, the newest first."""
    found = [path for path in root.glob("version_*") if path.name.removeprefix("version_").isdecimal()]
    return sorted(found, key=lambda path: -_number(path))


def _number(version: Path) -> int:
    return int(version.name.removeprefix("version_"))


def started_before(places: Sequence[Path], config: Namespace) -> Path | None:
    """The one of ``places`` with this job's run of the same settings, where the job is started again."""
    if not is_restart():
        return None
    ours = record(config)
    same = (path for path in places if all(read(path).get(key) == ours[key] for key in ("job", "config")))
    return next(same, None)


def check_identity(directory: Path, config: Namespace) -> None:
    """Raises a ``ValueError`` where ``directory`` holds a run of another experiment."""
    if read(directory).get("identity", identity(config)) != identity(config):
        raise ValueError(
            f"ckpt_path: the run in {directory} is of another experiment: {', '.join(IDENTITY)} must be the same, see "
            f"{directory / 'config.yaml'}; give its own experiment, or the path of another run's last.ckpt"
        )


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
