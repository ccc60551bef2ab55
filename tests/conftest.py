"""What all tests share: no network, few threads, and no leftovers in the working directory."""

from __future__ import annotations

import os

# before anything imports torch or a hub client
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads cost more than they bring
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same random numbers in every run, alone or among others."""
    torch.manual_seed(int(os.environ.get("EMF_TEST_SEED", "0")))
