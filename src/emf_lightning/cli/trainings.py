"""Trainings in processes of their own, several at a time: what `emf compare` and `emf claim` are made of."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

LOG = "fit.log"
"""What a training says that is not the only one at its time."""


def fit(arguments: Sequence[str], folder: Path, jobs: int = 1) -> None:
    """`emf fit` with ``arguments`` into the run directory ``folder``, from its last checkpoint on where it has one.

    Args:
        arguments: of ``emf fit``; that it writes into ``folder`` is theirs to say.
        folder: made if missing.
        jobs: trainings that run at the same time. Where there are several, each takes its share of the CPU's threads,
            and what it says goes to ``fit.log`` in its folder.

    Raises:
        ValueError: where it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "checkpoints" / "last.ckpt"
    resume = ["--ckpt_path", str(last)] if last.is_file() else []
    command = [sys.executable, "-m", "emf_lightning", "fit", *arguments, *resume]
    print(f"training: {folder}{f', log in {LOG}' if jobs > 1 else ''}\n", end="", flush=True)  # one write, one line
    if jobs == 1:
        status, said = subprocess.run(command, check=False).returncode, "what it said stands above"
    else:
        threads = max((os.cpu_count() or 1) // jobs, 1)  # threads that outnumber the cores spin, and cost more than one
        said = f"what it said is in {folder / LOG}"
        with (folder / LOG).open("a") as log:
            status = subprocess.run(
                command,
                check=False,
                stdout=log,
                stderr=log,
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
            ).returncode
    if status:
        raise ValueError(f"the training in {folder} ended with status {status}; {said}; the same call goes on with it")


def side_by_side(tasks: Sequence[Callable[[], Result]], jobs: int) -> Iterator[Result]:
    """What ``tasks`` return, as they end, ``jobs`` of them at a time; they begin in their order.

    Raises:
        ValueError: for fewer than one at a time; at the end, where tasks raised one: the others are done by then.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    failures: list[ValueError] = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in as_completed([pool.submit(task) for task in tasks]):
                try:
                    result = done.result()
                except ValueError as error:
                    failures.append(error)
                    print(f"{error}\n", end="", file=sys.stderr, flush=True)
                else:
                    yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        others = f"; {len(failures) - 1} more failed, see above" if len(failures) > 1 else ""
        raise ValueError(f"{failures[0]}{others}") from failures[0]
