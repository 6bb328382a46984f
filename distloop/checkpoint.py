"""What was learned, in files that any tool reads: safetensors by parameter name, no pickle."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distloop.errors import ConfigError, StorageError
from distloop.transports import Transport


def prefixes_of(names: Collection[str]) -> dict[str, str]:
    """Return by model what its names begin with in a file: its own name, where there are several."""
    return {name: f"{name}." if len(names) > 1 else "" for name in names}


def model_state(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return parameters and buffers by name; names start with the model's where there are several."""
    prefixes = prefixes_of(models)
    state = {prefixes[name] + key: value for name, model in models.items() for key, value in model.state_dict().items()}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"state_dict entry {key!r} is a {type(value).__name__}: a model's file holds tensors alone"
            )
    return state


def refuse_left_out(name: str, model: nn.Module, trained: Iterable[str]) -> None:
    """Raise ConfigError if a model's ``state_dict`` leaves a trained parameter out: it would be learned in vain."""
    known = model.state_dict().keys()
    for key in trained:
        if key not in known:
            raise ConfigError(f"objective {name!r}: the model's state_dict leaves out {key!r}, which is trained")


def distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return copies of all tensors on the CPU, one of those that are the same, and which name stands for which other.

    Views of one memory may not be stored as such, and one tensor under two names is stored once.
    """
    seen: dict[tuple[object, ...], str] = {}
    copies: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for key, value in state.items():
        same = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        first = seen.setdefault(same, key) if value.numel() else key
        if first != key:
            tied[key] = first
        else:
            copies[key] = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format).copy_(value)
    return copies, tied


def save_model(path: Path, models: Mapping[str, nn.Module]) -> None:
    """Write the models to ``path``: the whole file or none, also if this process is killed meanwhile.

    It outlasts a loss of power only after :func:`make_durable`, which may take longer than many steps.

    Raises:
        StorageError: it cannot be written.
    """
    from safetensors.torch import save

    state, tied = distinct(model_state(models))
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(save(state, metadata={"format": "pt", **tied}))
        partial.replace(path)
    except OSError as failure:
        raise StorageError(f"{path}: cannot be written: {failure.strerror}") from failure


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` for people and programs; JSON has no NaN and no infinity, so they become null.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        path.write_text(json.dumps(finite(values), indent=2) + "\n")
    except OSError as failure:
        raise StorageError(f"{path}: cannot be written: {failure.strerror}") from failure


def finite(value: Any) -> Any:
    """Return ``value`` with null in place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_durable(path: Path) -> None:
    """Return when ``path`` and its name are on the disk.

    Raises:
        StorageError: the disk refuses.
    """
    try:
        for place in (path, path.parent):
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as failure:
        raise StorageError(f"{path}: cannot be made durable: {failure.strerror}") from failure


@torch.no_grad()
def load_model(path: Path, models: Mapping[str, nn.Module], transport: Transport) -> None:
    """Read ``path`` on rank 0 and give it to every rank's models.

    Raises:
        StorageError: it cannot be read.
    """
    from safetensors.torch import load_file

    saved: dict[str, Tensor] = {}
    if transport.rank == 0:
        try:
            saved = load_file(path)
        except OSError as failure:
            raise StorageError(f"{path}: cannot be read: {failure.strerror or failure}") from failure
    for key, value in model_state(models).items():
        if key in saved:
            value.copy_(saved[key])
        transport.broadcast(value)
