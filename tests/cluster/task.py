"""The task of tests/restarting.py under a scheduler, at a pace that leaves time to stop it."""

from __future__ import annotations

import os
import time
from typing import Any

from tests import restarting

SECONDS = 0.05  # a sample


class Slow(restarting.Augmented):
    """The samples, each after a while."""

    def __getitem__(self, index: int) -> Any:
        time.sleep(SECONDS)
        return super().__getitem__(index)


class Restarted(restarting.Restarted):
    """Its journals are numbered as Slurm counts the starts of a job, from FIRST on."""

    def __init__(self) -> None:
        own = {
            "ATTEMPT": str(int(os.environ.get("FIRST", "0")) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))),
            "RANK": os.environ.get("RANK", os.environ["SLURM_PROCID"]),
        }
        before = {name: os.environ.get(name) for name in own}
        os.environ |= own
        super().__init__()
        for name, value in before.items():
            if value is None:
                del os.environ[name]  # it would stand for torchrun
        self.train = Slow()
