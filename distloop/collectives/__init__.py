"""Collectives: all-reduce algorithms written over a transport, each ``(transport, tensor) -> None`` and in place."""

from collections.abc import Callable

from torch import Tensor

from distloop.collectives import naive
from distloop.transports import Transport

AllReduce = Callable[[Transport, Tensor], None]

ALL_REDUCE: dict[str, AllReduce] = {"naive": naive.all_reduce}

__all__ = ["ALL_REDUCE", "AllReduce"]
