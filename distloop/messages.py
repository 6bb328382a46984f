"""Small objects between ranks, as JSON: nothing that is received is ever executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distloop.errors import DistloopError, MismatchError
from distloop.transports import Transport
from distloop.transports.differences import first_difference


def gather_json(transport: Transport, value: Any) -> list[Any]:
    """Return every rank's ``value``, by rank."""
    return [json.loads(bytes(row.tolist())) for row in gather_uneven(transport, _bytes(value))]


def agree_on(
    transport: Transport, facts: Mapping[str, Any], what: str, *, error: type[DistloopError] = MismatchError
) -> None:
    """Check that all ranks know the same facts.

    Raises:
        MismatchError: (or ``error``) they do not, on all ranks alike; names the first difference, with both sides.
    """
    own = digest(json.dumps(dict(facts), sort_keys=True))
    every = transport.all_gather(torch.tensor([own], dtype=torch.int64)).wait()
    if (every == own).all():
        return
    if different := first_difference(gather_json(transport, dict(facts))):
        raise error(f"ranks differ in {what}: {different}")


def digest(text: str) -> int:
    """Return 56 bits that tell texts apart."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def gather_uneven(transport: Transport, tensor: Tensor) -> list[Tensor]:
    """Return every rank's ``tensor``, by rank; dtype and number of dimensions are the same, the sizes need not be."""
    sizes = transport.all_gather(torch.tensor(tensor.shape, dtype=torch.int64)).wait()
    largest = sizes.amax(0).tolist()
    padded = torch.zeros(largest, dtype=tensor.dtype)
    padded[tuple(slice(n) for n in tensor.shape)] = tensor.detach().cpu()
    rows = transport.all_gather(padded).wait()
    return [
        rows[rank][tuple(slice(n) for n in sizes[rank].tolist())].to(tensor.device) for rank in range(transport.size)
    ]


def _bytes(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
