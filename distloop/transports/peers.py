"""Ranks of one host watch each other's processes."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence

from distloop.errors import RankDiedError


class Peers:
    """The processes of a host's ranks: are they alive?"""

    def __init__(self, ranks: Sequence[int], pids: Sequence[int]):
        self._ranks: dict[int, int] = {}
        self._poll = select.poll()
        for rank, pid in zip(ranks, pids, strict=True):
            if pid != os.getpid():
                try:
                    handle = os.pidfd_open(pid)
                except OSError:
                    self.close()
                    raise
                self._ranks[handle] = rank
                self._poll.register(handle, select.POLLIN)

    def check(self, seconds: float = 0.0) -> None:
        """Raise RankDiedError if one has ended, or does within ``seconds``."""
        for handle, _ in self._poll.poll(seconds * 1000):
            raise RankDiedError(f"rank {self._ranks[handle]} of this host has ended")

    def close(self) -> None:
        for handle in self._ranks:
            os.close(handle)
        self._ranks.clear()
        self._poll = select.poll()
