"""A checkpoint to go on from, and what each rank had in it for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distloop.checkpoints import Checkpoint
from distloop.own_state import unpack


@dataclass
class Resumed:
    """A checkpoint to go on from."""

    checkpoint: Checkpoint

    @property
    def ranks(self) -> int:
        """How many ranks wrote it."""
        return len(self.checkpoint.state["ranks"])

    def own_facts(self, name: str) -> Any:
        """Return what rank 0 had under ``name``; tensors are left out."""
        return self.checkpoint.state["ranks"][0]["state"][name]

    def describe(self) -> str:
        """Return in words what it is."""
        facts = self.checkpoint.manifest["facts"]
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        return f"from step {self.checkpoint.step}, of {ranks} with {facts['strategy']}: {self.checkpoint.path}"


class OwnStates(Sequence[Any]):
    """The states of all ranks under one name, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._checkpoint, self._name = checkpoint, name

    def __len__(self) -> int:
        return len(self._checkpoint.state["ranks"])

    def __getitem__(self, rank: Any) -> Any:
        packed = self._checkpoint.state["ranks"][rank]["state"][self._name]
        return unpack(packed, self._checkpoint.read)
