"""Common to all tests: one torch thread, so that forked and threaded ranks share two cores in peace."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60, print_blob=True)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine that runs the tests decides what they see."""
    for name in list(os.environ):
        if name.startswith(("DISTLOOP_", "SLURM_", "OMPI_", "PMI_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    torch.manual_seed(0)
