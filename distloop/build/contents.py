"""What can be told about a data set without reading it: how long it is, and whether two ranks have the same."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from distloop.errors import DataError


def samples_in(data: Any, what: str, *, empty: bool = False) -> int:
    """Return the number of samples of a map-style data set.

    Raises:
        DataError: it has no length, or, unless it may be ``empty``, no sample.
    """
    try:
        size = len(data)
    except TypeError:
        raise DataError(
            f"{what}: a {type(data).__name__} has no length; a map-style data set is needed (__len__ and __getitem__)"
        ) from None
    if size == 0 and not empty:
        raise DataError(f"{what}: the data set is empty")
    return size


def fingerprint(data: Any) -> str:
    """Return what tells apart two data sets of equal length, as far as that is cheap.

    The first and last rows of tensors and the indices of subsets, which a split without a seed makes different on
    every rank; of anything else its type.
    """
    if isinstance(data, Subset):
        return f"Subset {_digest(torch.as_tensor(list(data.indices)))} of {fingerprint(data.dataset)}"
    if isinstance(data, TensorDataset):
        rows = [torch.cat([t[:4], t[-4:]]) for t in data.tensors]
        return f"{type(data).__name__} " + " ".join(_digest(r) for r in rows)
    return type(data).__name__


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:8]
