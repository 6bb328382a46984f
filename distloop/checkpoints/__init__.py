"""Checkpoints that cannot tear: a directory for each, whole and verified, or not there.

What a loader finds after a crash at any moment is the old checkpoint or the new one. Files are safetensors and JSON;
nothing that is read is executed, and nothing is believed before its sha256 has been compared.
"""

from __future__ import annotations

from distloop.checkpoints.disk import Disk
from distloop.checkpoints.draft import Draft
from distloop.checkpoints.lock import RunLock
from distloop.checkpoints.reading import Checkpoint
from distloop.checkpoints.store import Checkpoints
from distloop.checkpoints.table import Info, Piece
from distloop.checkpoints.tensors import Stored

__all__ = ["Checkpoint", "Checkpoints", "Disk", "Draft", "Info", "Piece", "RunLock", "Stored"]
