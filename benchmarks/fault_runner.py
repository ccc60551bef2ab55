"""Runs one command in a forked process that a fault meets, and judges how it ended."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

HUNG_AFTER = 120.0
"""Seconds after which a command counts as hung; each takes some seconds."""


@dataclass(frozen=True)
class Ending:
    """How a command ended: exit status (negative: a signal's number), its output, and True if it had to be killed."""

    status: int
    output: str
    hung: bool = False
    killed: bool = False

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output


def start(command: Callable[[], object], directory: Path, file_limit: int | None = None) -> tuple[int, int]:
    """Forks a process that runs ``command`` in ``directory``; returns its number and the pipe of its output.

    Args:
        command: what to run; torch is imported already, so that it starts at once.
        directory: working directory of the process, which leads a group of its own.
        file_limit: greatest size of a file in bytes; a longer one fails as on a full disk.
    """
    output, write = os.pipe()  # a limit of file sizes is none of a pipe's
    number = os.fork()
    if number == 0:
        _child(command, directory, write, file_limit)
    os.close(write)
    os.set_blocking(output, False)
    return number, output


def _child(command: Callable[[], object], directory: Path, output: int, file_limit: int | None) -> NoReturn:
    status = 1
    try:
        os.setsid()
        os.chdir(directory)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        command()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def wait(started: tuple[int, int], faults: Sequence[tuple[float, int]] = ()) -> Ending:
    """Waits for a started process; sends it each signal of ``faults`` after its number of seconds."""
    number, output = started
    begin, due, killed, text = time.monotonic(), sorted(faults), False, b""
    while True:
        done, status = os.waitpid(number, os.WNOHANG)
        text += _available(output)
        passed = time.monotonic() - begin
        if done:
            _kill(number)  # workers of the process
            os.close(output)
            return Ending(os.waitstatus_to_exitcode(status), text.decode(errors="replace"), killed=killed)
        if due and passed >= due[0][0]:
            sent = due.pop(0)[1]
            killed |= sent == signal.SIGKILL
            if sent == signal.SIGKILL:
                _kill(number)
            else:
                os.kill(number, sent)
        elif passed > HUNG_AFTER:
            _kill(number)
            os.waitpid(number, 0)
            os.close(output)
            return Ending(-signal.SIGKILL, text.decode(errors="replace"), hung=True)
        else:
            time.sleep(0.005)


def _available(pipe: int) -> bytes:
    text = b""
    try:
        while part := os.read(pipe, 1 << 16):
            text += part
    except BlockingIOError:
        pass
    return text


def _kill(number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def run(command: Callable[[], object], directory: Path, file_limit: int | None = None) -> Ending:
    """Runs a command to its end without a signal."""
    return wait(start(command, directory, file_limit))
