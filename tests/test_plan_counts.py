"""Numbers of `emf plan` that follow from one another."""

from __future__ import annotations

import pytest

from tests.test_plan import here, planned  # noqa: F401


def test_sharding_divides_the_states_and_accumulation_multiplies_the_step():
    files = [part for name in ("emf/sana", "devices/fsdp2") for part in ("--config", f"experiments/{name}.yaml")]
    one, two = (
        planned(*files, "--trainer.devices", "8", "--samples", "1000", "--trainer.accumulate_grad_batches", number)
        for number in ("1", "2")
    )
    words = {name: value.split() for name, value in one.items()}
    gb = {name: float(found[0]) for name, found in words.items() if found[1:2] == ["GB"]}
    saved = gb["in all, one device or DDP"] - gb["in all, FSDP2 over 8"]
    states = gb["weights, gradients, AdamW"]
    buckets = states / 4  # DDP's, of the gradients
    assert 0.9 < saved / (7 / 8 * states + buckets) < 1, "less two gathered blocks"
    assert float(two["a step"].split()[0]) == pytest.approx(2 * float(one["a step"].split()[0]), rel=0.01)


def test_frozen_copies_take_memory():
    rows = planned("--config", "experiments/scflow/coco.yaml")
    assert float(rows["frozen"].split()[0]) > 4 * 1.719, "teacher and consistency target in fp32"
