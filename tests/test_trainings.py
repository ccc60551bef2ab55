"""Trainings in processes of their own: what becomes of those that fail, and how many run at a time."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from emf_lightning.cli.run_lock import lock, read
from emf_lightning.cli.trainings import LOG, fit, run_in_parallel


def test_as_many_tasks_as_allowed_run_at_a_time():
    lock, both, running, most = threading.Lock(), threading.Barrier(2), 0, 0

    def task() -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(60)
        time.sleep(0.05)  # a third one would be seen
        with lock:
            running -= 1
        return most

    assert len(list(run_in_parallel([task] * 6, 2))) == 6
    assert most == 2


def test_tasks_that_fail_keep_no_other_from_its_time(capsys):
    def task(number: int) -> int:
        if number in (1, 3):
            raise ValueError(f"number {number} failed")
        return number

    found = []
    with pytest.raises(ValueError, match="number 1 failed; 1 more failed, see above"):
        found.extend(run_in_parallel([lambda n=n: task(n) for n in range(6)], 1))
    assert sorted(found) == [0, 2, 4, 5]
    assert "number 3 failed" in capsys.readouterr().err


def test_none_at_a_time_is_refused():
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        list(run_in_parallel([], 0))


def test_a_training_that_fails_says_where_its_words_are(tmp_path):
    with pytest.raises(ValueError, match=f"ended with status 2; what it said is in .*{LOG}"):
        fit(["--config", "nowhere.yaml"], tmp_path / "run", jobs=2)
    assert "nowhere.yaml: no such file" in (tmp_path / "run" / LOG).read_text()


def test_a_training_waits_for_the_end_of_the_one_that_a_killed_call_left(tmp_path, capsys):
    script = """import sys, time; from pathlib import Path; from emf_lightning.cli.run_lock import lock, process
run = Path(sys.argv[1]); file = lock(run, process() | {"job": 7}); print(1, flush=True); input(); time.sleep(1)
(run / "saved").touch()"""
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=-1, stdout=-1) as left:
        assert left.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match=f"process {left.pid} on .* works there"):
            lock(tmp_path, {}, patience=0.3)
        left.stdin.write(b"\n")
        left.stdin.flush()
        with pytest.raises(ValueError, match="ended with status 2"):  # the training has begun
            fit(["--config", "nowhere.yaml"], tmp_path)
    assert (tmp_path / "saved").exists() and f"waiting up to 120 s for process {left.pid}" in capsys.readouterr().out
    assert read(tmp_path)["job"] == 7  # what the run's own record says is kept
