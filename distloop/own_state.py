"""What belongs to one rank alone: random generators, and what tasks collected; as JSON and tensors, never as code."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distloop.checkpoints import Stored
from distloop.errors import ConfigError

TENSOR = "$tensor"  # the key under which a packed state has the name of a tensor


def pack(prefix: str, state: Any) -> tuple[Any, list[Stored]]:
    """Return a nested state in JSON's types, and its tensors, which it then has by name.

    Raises:
        ConfigError: something in it is no mapping, list, tensor, number or text.
    """
    if isinstance(state, Tensor):
        return {TENSOR: prefix}, [Stored(prefix, state.detach().to("cpu", copy=True))]
    if isinstance(state, np.ndarray):
        return pack(prefix, torch.from_numpy(state.copy()))
    if isinstance(state, Mapping):
        for key in state:
            if not isinstance(key, str) or not key.isprintable() or "/" in key or key == TENSOR:
                raise ConfigError(f"{prefix}: {key!r}: keys of a state are words, without slashes")
        items: Any = {key: pack(f"{prefix}/{key}", value) for key, value in state.items()}
        return {key: packed for key, (packed, _) in items.items()}, [t for _, own in items.values() for t in own]
    if isinstance(state, list | tuple):
        listed = [pack(f"{prefix}/{i}", value) for i, value in enumerate(state)]
        return [packed for packed, _ in listed], [t for _, own in listed for t in own]
    if state is None or isinstance(state, bool | int | float | str):
        return state, []
    if isinstance(state, np.generic):
        return state.item(), []
    raise ConfigError(
        f"{prefix}: a state holds tensors, numbers, text, lists and mappings, not a {type(state).__name__}"
    )


def unpack(packed: Any, read: Callable[[str], Tensor]) -> Any:
    """Return what was packed."""
    if isinstance(packed, dict):
        if packed.keys() == {TENSOR}:
            return read(packed[TENSOR])
        return {key: unpack(value, read) for key, value in packed.items()}
    return [unpack(value, read) for value in packed] if isinstance(packed, list) else packed


def generators(device: torch.device) -> dict[str, Any]:
    """Return the states of this rank's generators: torch's on CPU and GPU, Python's and numpy's."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.default_generator.get_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "rest": [int(position), int(has_gauss), float(cached)],
        },
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generators(state: Mapping[str, Any], device: torch.device) -> None:
    """Set this rank's generators to :func:`generators`."""
    torch.default_generator.set_state(state["torch"])
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state((numpy["kind"], numpy["keys"].numpy().astype(np.uint32), *numpy["rest"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
