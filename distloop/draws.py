"""What a data set draws at random while it is read: the same for a sample wherever it is read, and without a trace.

Three generators belong to the whole process: torch's on the CPU, Python's and numpy's. A data set that augments draws
from them; so does training, where there is dropout. Before each sample they are seeded by (seed, epoch, index), and
afterwards they are as they were. So the number of ranks and of workers, and where a run was resumed, change no sample;
and how samples are read changes nothing that training draws. Data to evaluate on is read in the same way.

A data set that reads whole batches (``__getitems__``) is seeded by the first index of each, so what it draws is the
same only for the same micro-batches; and so is what a ``collate`` draws, which goes on from the batch's last sample.

Measured on one core of a shared machine: 10 us for a sample (5 of them for Python's generator), and 40 us for a batch
that is read outside of worker processes. Plain tensors draw nothing and cost nothing.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from distloop.order import hashed

_READING = threading.RLock()  # ranks that are threads share the generators


def seed_all(draws: int, index: int) -> None:
    """Seed the three generators for a sample. (Torch's and numpy's take 32 bits of a seed, and here not the same.)"""
    bits = hashed(draws, index)
    torch.default_generator.manual_seed(bits)
    np.random.seed(bits >> 32)  # the global one, which is what data sets draw from
    random.seed(bits)


@contextmanager
def without_trace() -> Iterator[None]:
    """Leave the three generators as they are found."""
    with _READING:
        own, python = torch.default_generator.get_state(), random.getstate()
        back = _NUMPY.put_aside()
        try:
            yield
        finally:
            torch.default_generator.set_state(own)
            random.setstate(python)
            _NUMPY.put_back(*back)


class _Numpy:
    """Puts another bit generator in the place of numpy's global one, which is left alone meanwhile.

    What is lost by that is the second of two normals that numpy draws at once and keeps for the next call. Whether it
    has one is only told together with the whole state, which takes as long as seeding for ten samples. So that is only
    asked for if the bits in memory are others than when the answer was no.
    """

    SIZE = 4 * 624 + 4  # bytes of a Mersenne Twister's state

    def __init__(self) -> None:
        self._other = np.random.MT19937(0)
        self._even: tuple[Any, bytes] | None = None  # a bit generator, and its state when no normal was kept

    def put_aside(self) -> tuple[Any, Any]:
        """Return the global bit generator, and the whole state if a normal is kept."""
        own, state = np.random.get_bit_generator(), None  # type: ignore[attr-defined]  # not in numpy's stubs
        seen = self._bits(own)
        if seen is None or self._even != (own, seen):
            state = np.random.get_state(legacy=False)
            if not state["has_gauss"] and own is not self._other:
                self._even, state = (own, seen) if seen is not None else None, None
        np.random.set_bit_generator(self._other)  # type: ignore[attr-defined]
        return own, state

    def put_back(self, own: Any, state: Any) -> None:
        np.random.set_bit_generator(own)  # type: ignore[attr-defined]
        if state is not None:
            np.random.set_state(state)

    def _bits(self, own: Any) -> bytes | None:
        if type(own) is not np.random.MT19937 or own is self._other:
            return None
        return ctypes.string_at(own.ctypes.state_address, self.SIZE)


_NUMPY = _Numpy()
