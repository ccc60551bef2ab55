"""Trainings in processes of their own: what becomes of those that fail, and how many run at a time."""

from __future__ import annotations

import threading
import time

import pytest

from emf_lightning.cli.trainings import LOG, fit, side_by_side


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

    assert len(list(side_by_side([task] * 6, 2))) == 6
    assert most == 2


def test_no_further_task_begins_after_one_that_failed():
    begun = []

    def task(number: int) -> None:
        begun.append(number)
        time.sleep(0.01)
        if number == 1:
            raise ValueError("the second one failed")

    with pytest.raises(ValueError, match="the second one failed"):
        for _ in side_by_side([lambda n=n: task(n) for n in range(200)], 1):
            pass
    assert len(begun) < 200


def test_none_at_a_time_is_refused():
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        list(side_by_side([], 0))


def test_a_training_that_fails_says_where_its_words_are(tmp_path):
    with pytest.raises(ValueError, match=f"ended with status 2; what it said is in .*{LOG}"):
        fit(["--config", "nowhere.yaml"], tmp_path / "run", jobs=2)
    assert "nowhere.yaml: no such file" in (tmp_path / "run" / LOG).read_text()
