"""A forked process has all that a process of its own has."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests import forked


def look() -> None:
    assert os.getpid() == os.getpgid(0) == os.getsid(0)
    assert multiprocessing.get_start_method() == os.environ["METHOD"]
    assert "emf_lightning.networks.sana" in sys.modules, "before anything asks for it"
    sys.stdout.write(f"{os.getcwd()} {os.environ['NAME']} {'GONE' in os.environ}\n")
    sys.stderr.write("an error\n")
    raise SystemExit(7)


def sleep(mark: str) -> None:
    Path(mark).touch()
    time.sleep(600)


def test_it_has_its_own_folder_environment_output_and_status(tmp_path, monkeypatch):
    monkeypatch.setenv("GONE", "1")
    own = {"NAME": "own", "METHOD": multiprocessing.get_start_method()}
    done = forked.run(look, folder=tmp_path, **own)
    monkeypatch.delenv("GONE")
    assert (done.returncode, done.stdout, done.stderr) == (7, f"{tmp_path} own True\n", "an error\n")
    assert forked.run(look, folder=tmp_path, **own).stdout == f"{tmp_path} own False\n"
    assert "NAME" not in os.environ and Path.cwd() != tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_its_group_alone(tmp_path, number):
    process = forked.Forked(sleep, "mark", folder=tmp_path)
    while not (tmp_path / "mark").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.wait() == -number


def test_the_command_line_gets_its_words(tmp_path):
    done = forked.run(forked.emf, "fit", "--config", "nowhere.yaml", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("emf fit: --config nowhere.yaml: no such file")
