"""Processes of their own that start at once: forks of one that has imported everything and run nothing.

Imports are nine tenths of a short process's time. ``multiprocessing``'s fork server imports ``tests.preloaded`` once;
each call then has its own process, group, folder, arguments, environment, output and exit status. Tests of start-up
itself, of import paths and of launchers take real interpreters.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from emf_lightning.cli import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Forked:
    """A call in a process of its own, which is waited for as a ``subprocess.Popen`` is.

    Args:
        call: function of a module, which gets ``arguments``.
        arguments: what can be pickled.
        folder: working directory.
        output: files for stdout and stderr, appended to; by default both are pytest's.
        environment: variables in addition to this process's.
    """

    def __init__(
        self,
        call: Callable[..., object],
        *arguments: Any,
        folder: Path | None = None,
        output: tuple[Path, Path] | None = None,
        **environment: str,
    ) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        with patch.dict(os.environ, PYTHONPATH=path):  # not every Python gives the server its import path
            forkserver.ensure_running()
        output = output and (output[0].resolve(), output[1].resolve())
        method = multiprocessing.get_start_method()
        given = (call, arguments, folder or Path.cwd(), output, os.environ | environment, method)
        self._process = _CONTEXT.Process(target=_enter, args=given)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit status, or a signal's negative number; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Exit status once the process has ended."""
        self._process.join(timeout)
        status = self.poll()
        assert status is not None, f"runs for longer than {timeout} s"
        return status


def emf(*arguments: str) -> None:
    """`emf ARGUMENTS`."""
    sys.argv = ["emf", *arguments]
    main()


def run(call: Callable[..., object], *arguments: Any, folder: Path | None = None, **environment: str) -> Any:
    """Runs a call in a process of its own to its end: its exit status and what it said."""
    with TemporaryDirectory() as place:
        files = Path(place, "out"), Path(place, "err")
        status = Forked(call, *arguments, folder=folder, output=files, **environment).wait()
        return subprocess.CompletedProcess(arguments, status, *(file.read_text() for file in files))


def _enter(
    call: Callable[..., object],
    arguments: tuple[Any, ...],
    folder: Path,
    output: tuple[Path, Path] | None,
    environment: Mapping[str, str],
    method: str,
) -> None:
    multiprocessing.set_start_method(method, force=True)  # of its own processes: it would be the fork server's
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(output or (), start=1):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    call(*arguments)
