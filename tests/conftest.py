"""Common to all tests: one torch thread, so that forked and threaded ranks share two cores in peace."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# What tests compile and measure is not for the user who runs them to keep.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="distloop-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many tests run beside each other: one a core and one more, for many of them wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + 1, 8)
