"""What is in a checkpoint as one file that other tools read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from distloop.checkpoints.disk import Disk, storing
from distloop.checkpoints.reading import Checkpoint
from distloop.checkpoints.tensors import Stored, file_of, parts
from distloop.errors import CheckpointError

MODEL, OPTIMIZER = "model", "optim"  # how the names of their files begin


def write_safetensors(checkpoint: Checkpoint, output: Path, *, optimizer: bool = False) -> int:
    """Write the model as one safetensors file, tied tensors once; return how many tensors it has.

    Raises:
        StorageError: it cannot be written.
    """
    names = names_in(checkpoint, MODEL) + (names_in(checkpoint, OPTIMIZER) if optimizer else [])
    found, header = file_of((Stored(name, checkpoint.read(name)) for name in names), tied(checkpoint))
    _replace(output, lambda path: Disk().write(path, parts(found, header)))
    return len(found)


def write_torch(checkpoint: Checkpoint, output: Path, *, optimizer: bool = False) -> int:
    """Write the model as ``torch.save`` does its ``state_dict``, tied tensors under each of their names.

    With ``optimizer`` it is {"model": state_dict, "optimizer": {parameter: {name: tensor}}}.

    Raises:
        StorageError: it cannot be written.
    """
    import torch

    state: dict[str, Any] = {name: checkpoint.read(name).contiguous() for name in names_in(checkpoint, MODEL)}
    state |= {name: state[first] for name, first in tied(checkpoint).items()}
    count = len(state)
    if optimizer:
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for name in names_in(checkpoint, OPTIMIZER):
            parameter, _, kind = name.rpartition("/")
            by_parameter.setdefault(parameter, {})[kind] = checkpoint.read(name).contiguous()
            count += 1
        state = {"model": state, "optimizer": by_parameter}

    def write(path: Path) -> None:
        with path.open("xb") as file:
            torch.save(state, file)
            _sync(file)

    _replace(output, write)
    return count


def names_in(checkpoint: Checkpoint, kind: str) -> list[str]:
    """Return the tensors that are in files whose names begin so.

    Raises:
        CheckpointError: there is none.
    """
    found = [name for name, info in checkpoint.tensors.items() if info.pieces[0].file.startswith(kind)]
    if not found:
        raise CheckpointError(f"{checkpoint.path}: has no tensors in files named {kind}…")
    return found


def tied(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names under which the model has a tensor once more, and the one under which it is stored."""
    found: dict[str, str] = {}
    for file, metadata in checkpoint.metadata.items():
        if file.startswith(MODEL):
            found |= {name: first for name, first in metadata.items() if first in checkpoint.tensors}
    return {name: first for name, first in found.items() if name not in checkpoint.tensors}


def _replace(output: Path, write: Callable[[Path], object]) -> None:
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    with storing(output):
        try:
            write(partial)
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
        Disk().sync_directory(output.parent)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
