"""Collectives: all-reduce algorithms written over a transport, each ``(transport, tensor) -> None`` and in place."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distloop.collectives import direct, hierarchical, naive, ring, tree
from distloop.transports import Transport

AllReduce = Callable[[Transport, Tensor], None]


def library(transport: Transport, tensor: Tensor) -> None:
    """Let the library behind the transport do it (gloo, NCCL, MPI); where there is none, rank 0."""
    if transport.library is None:
        naive.pipelined(transport, tensor)
    else:
        transport.library(tensor)


ALL_REDUCE: dict[str, AllReduce] = {
    "naive": naive.all_reduce,
    "naive_pipelined": naive.pipelined,
    "ring": ring.all_reduce,
    "direct": direct.all_reduce,
    "one_shot": direct.one_shot,
    "tree": tree.all_reduce,
    "hierarchical": hierarchical.all_reduce,
    "shared_memory": hierarchical.in_shared_memory,
    "library": library,
}
NARROW = {"direct": direct.all_reduce, "one_shot": direct.one_shot, "hierarchical": hierarchical.all_reduce}


def with_wire(name: str, wire: torch.dtype) -> AllReduce:
    """Return an algorithm that sends in fewer bits and sums in the tensor's own dtype; a name of ``NARROW``."""
    return partial(NARROW[name], wire=wire)


__all__ = ["ALL_REDUCE", "NARROW", "AllReduce", "with_wire"]
