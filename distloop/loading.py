"""How samples are read: whole batches at once where the data allows it, worker processes where it does not."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from distloop.draws import seed_all, without_trace
from distloop.errors import DataError, DistloopError

BLOCK_BATCHES, BLOCK_BYTES = 63, 2**20


@dataclass(frozen=True)
class Loading:
    """How samples are read: see the ``data`` section of the configuration."""

    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    timeout: float = 120.0


class Request(NamedTuple):
    """A batch to read: its samples' indices, and what seeds the draws of reading them."""

    indices: Tensor
    draws: int = 0


class Fetch:
    """Reads the samples of a batch.

    In the order of preference: tensors (a ``TensorDataset``) are indexed, one operation for the batch;
    ``__getitems__(indices)`` may return a finished batch, or a list of samples, which is then collated;
    ``__getitem__(index)`` is called for each. What they draw at random is seeded (see :mod:`distloop.draws`): for each
    sample by its index where samples are read one by one, for each batch by its first index where a batch is.
    """

    def __init__(self, samples: Any, collate: Callable[[Sequence[Any]], Any] | None = None):
        self.samples = samples
        self._collate: Callable[[list[Any]], Any] | None = collate
        plain = getattr(type(samples), "__getitem__", None) is TensorDataset.__getitem__  # no subclass's own
        self._plain = collate is None and plain and not hasattr(samples, "__getitems__")
        if self._plain:
            self._read: Callable[[Tensor, int], Any] = self._index
        elif hasattr(samples, "__getitems__"):
            self._read = self._many
        else:
            self._read = self._one_by_one

    def __call__(self, request: Request) -> Any:
        """Return the batch of these samples, and leave the process's generators as they are.

        Raises:
            DataError: a sample cannot be read; names the indices.
        """
        if self._plain:
            return self.in_worker(request)
        with without_trace():
            return self.in_worker(request)

    def in_worker(self, request: Request) -> Any:
        """Return the batch of these samples, in a process whose generators nothing else draws from."""
        try:
            return self._read(*request)
        except DistloopError:
            raise
        except Exception as failure:
            raise DataError(
                f"reading samples {_some(request.indices)} failed: {type(failure).__name__}: {failure}"
            ) from failure

    def all(self, requests: Iterator[Request]) -> Iterator[Any]:
        """Yield the batch of each request; small batches of tensors are cut from blocks that are read at once."""
        if not self._plain:
            yield from map(self, requests)
            return
        for first in requests:
            size = sum(t[:1].nbytes for t in self.samples.tensors) * len(first.indices)
            rest = islice(requests, min(BLOCK_BATCHES, BLOCK_BYTES // max(size, 1)))
            block = [first.indices, *(request.indices for request in rest)]
            sizes = [len(chosen) for chosen in block]
            yield from zip(*(t.split(sizes) for t in self(Request(torch.cat(block)))), strict=True)

    def _index(self, indices: Tensor, draws: int) -> tuple[Tensor, ...]:
        return tuple(t.index_select(0, indices.to(t.device) if t.is_cuda else indices) for t in self.samples.tensors)

    def _many(self, indices: Tensor, draws: int) -> Any:
        wanted = indices.tolist()
        seed_all(draws, wanted[0])
        batch = self.samples.__getitems__(wanted)
        return self._join(batch) if isinstance(batch, list) else batch

    def _one_by_one(self, indices: Tensor, draws: int) -> Any:
        return self._join([self._item(i, draws) for i in indices.tolist()])

    def _item(self, index: int, draws: int) -> Any:
        seed_all(draws, index)
        try:
            return self.samples[index]
        except Exception as failure:
            raise DataError(f"reading sample {index} failed: {type(failure).__name__}: {failure}") from failure

    def _join(self, items: list[Any]) -> Any:
        if self._collate is None:
            return default_collate(items)
        return self._collate(items)


class ToDevice:
    """Moves a batch to the device of the model, through pinned memory if asked for."""

    def __init__(self, device: torch.device, *, pin: bool):
        self._device, self._pin = device, pin and device.type == "cuda"
        self._stays = device.type == "cpu"

    def __call__(self, batch: Any) -> Any:
        return batch if self._stays else self._move(batch)

    def _move(self, batch: Any) -> Any:
        if isinstance(batch, Tensor):
            if self._pin and not batch.is_pinned():
                batch = batch.pin_memory()
            return batch.to(self._device, non_blocking=True)
        if hasattr(batch, "to"):  # a batch class of the user's or of a library's
            return batch.to(self._device)
        if isinstance(batch, dict):
            return {key: self._move(value) for key, value in batch.items()}
        if isinstance(batch, tuple) and hasattr(batch, "_fields"):
            return type(batch)(*(self._move(value) for value in batch))
        if isinstance(batch, list | tuple):
            return type(batch)(self._move(value) for value in batch)
        return batch


class _Batches:
    """A data set whose "index" is a request, so that DataLoader workers return finished batches and know no more."""

    def __init__(self, fetch: Fetch):
        self._fetch = fetch

    def __getitem__(self, wanted: tuple[npt.NDArray[np.int64], int]) -> Any:
        indices, draws = wanted
        try:
            return self._fetch.in_worker(Request(torch.from_numpy(indices), draws))
        except DataError as failure:
            return failure  # raised in a worker it would arrive wrapped in its traceback


def loader_batches(fetch: Fetch, requests: Iterator[Request], *, loading: Loading) -> Iterator[Any]:
    """Yield the batches of these requests in order, read ahead by worker processes as far as ``loading`` says.

    Raises:
        DataError: a sample cannot be read, or a worker died or hangs; names the indices.
    """
    asked: deque[Tensor] = deque()
    loader: DataLoader[Any] = DataLoader(
        _Batches(fetch),  # type: ignore[arg-type]  # map-style by its method, not by its base class
        sampler=_handed_out(requests, asked),
        batch_size=None,
        collate_fn=_as_it_is,  # torch's default would turn arrays into tensors, which without workers they stay
        num_workers=loading.workers,
        prefetch_factor=loading.prefetch,
        pin_memory=loading.pin_memory and torch.cuda.is_available(),
        timeout=loading.timeout,
        generator=torch.Generator(),  # else a seed for workers is drawn from the process's generator
        worker_init_fn=_end_with_parent,
    )
    try:
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch
            asked.popleft()
    except (RuntimeError, OSError) as failure:
        reason = (str(failure).strip().splitlines() or ["no reason given"])[0]
        at = f"at or after samples {_some(asked[0])}" if asked else "before it read any sample"
        raise DataError(f"a data worker failed {at}: {reason}") from failure


def _handed_out(requests: Iterator[Request], asked: deque[Tensor]) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """Yield each request when it is asked for, and note that it was."""
    for indices, draws in requests:
        asked.append(indices)
        yield indices.numpy(), draws  # an array travels as bytes, a tensor as a file of shared memory


def _end_with_parent(worker: int) -> None:
    """Have a worker end with its rank, however that ends: its copies of connections would keep the rank's open."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _as_it_is(batch: Any) -> Any:
    return batch


def _some(indices: Tensor) -> str:
    listed = indices[:8].tolist()
    return f"{listed}" if len(indices) == len(listed) else f"{str(listed)[:-1]}, ...] ({len(indices)} in all)"
