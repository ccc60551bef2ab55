"""Trainings in separate processes, several at a time, for `emf compare` and `emf claim`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from emf_lightning.cli.run_lock import lock, read

Result = TypeVar("Result")

ENDS_WITH_PARENT = "EMF_ENDS_WITH_PARENT"
"""Environment variable of a process whose standard input closes when its parent ends."""

RUN_DIRECTORY = "EMF_RUN_DIRECTORY"
"""Environment variable of a training with the directory that it writes into."""

LOG = "fit.log"
"""File of a training's output where several run at a time."""

PATIENCE = 120
"""Seconds that a training waits for another one in its directory: a killed call's ends at its next step boundary."""


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises a ``ValueError`` for a seed that the random generators do not take."""
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise ValueError(f"seeds must lie in 0 .. {2**32 - 1:,}, got {', '.join(map(str, wrong))}")


def fit(arguments: Sequence[str], folder: Path, jobs: int = 1) -> None:
    """Runs `emf fit` with ``arguments`` in the run directory ``folder``; resumes from its last checkpoint, if any.

    Args:
        arguments: arguments of ``emf fit``.
        folder: run directory, created if missing.
        jobs: trainings that run at the same time. If there are several, each gets its share of the CPU's threads, and
            its output goes to ``fit.log`` in its folder.

    Raises:
        ValueError: where the training fails, or another process works in ``folder`` for longer than ``PATIENCE``.
    """
    lock(folder, read(folder), PATIENCE).close()  # the training locks it again
    last = max((folder / "checkpoints").glob("last*.ckpt"), key=os.path.getmtime, default=None)
    resume = [] if last is None else ["--ckpt_path", str(last)]
    command = [sys.executable, "-m", "emf_lightning", "fit", *arguments, *resume]
    print(f"training: {folder}{f', log in {LOG}' if jobs > 1 else ''}\n", end="", flush=True)  # one write, one line
    environment = {**os.environ, RUN_DIRECTORY: str(folder)}
    if jobs == 1:
        status, place = _run(command, env=environment), "above"
    else:
        threads = max((os.cpu_count() or 1) // jobs, 1)  # more threads than cores slow each other down
        place = f"in {folder / LOG}"
        with (folder / LOG).open("a") as log:
            status = _run(command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": str(threads), **environment})
    if status:
        said = f"what it said is {place}; the same call resumes it"
        raise ValueError(f"the training in {folder} ended with status {status}; {said}")


def _run(command: Sequence[str], **options: Any) -> int:
    """Status of ``command``, which ends with this process, however it ends: the pipe to it closes."""
    environment = options.pop("env") | {ENDS_WITH_PARENT: "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, **options) as process:
        return process.wait()


def end_with_parent() -> None:
    """Sends this process SIGTERM once the parent that started it by ``fit`` is gone; it saves its state first."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.pop(ENDS_WITH_PARENT, None):
        threading.Thread(target=watch, daemon=True).start()


def run_in_parallel(tasks: Sequence[Callable[[], Result]], jobs: int) -> Iterator[Result]:
    """Yields the results of ``tasks`` as they finish; ``jobs`` of them run at a time, started in their order.

    Raises:
        ValueError: for ``jobs`` below 1; where a task raised one, after all other tasks have finished.
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
