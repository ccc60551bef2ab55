"""Trainings in processes of their own: what becomes of those that fail, and how many run at a time."""

from __future__ import annotations

import threading
import time

import pytest

from emf_lightning.cli.trainings import LOG, fit, run_in_parallel


def test_as_many_tasks_as_allowed_run_at_a_time():
    lock, running, most = threading.Lock(), 0, 0

    def task() -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
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
