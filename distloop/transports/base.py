"""What a transport is: messages between ranks, and the two collectives that control traffic needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

CONTROL_TAG = 1  # keeps control messages apart from gradients, which travel with tag 0


class Work(Protocol):
    """An operation under way."""

    def wait(self) -> object:
        """Return when the operation is complete; raise if a peer failed or the timeout passed."""


class Rows:
    """The result of an ``all_gather`` under way: one row per rank."""

    def __init__(self, rows: Tensor, works: list[Work]):
        self._rows, self._works = rows, works

    def wait(self) -> Tensor:
        """Return the tensor of shape ``(size, *shape)`` whose row ``r`` came from rank ``r``."""
        while self._works:
            self._works.pop().wait()
        return self._rows


class Transport(ABC):
    """Point-to-point messages between ``size`` ranks, delivered in order per (source, destination, tag)."""

    rank: int
    size: int

    @abstractmethod
    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        """Start sending ``tensor``; do not change it before the work is complete."""

    @abstractmethod
    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        """Start receiving into ``tensor``, whose shape and dtype must be the sender's."""

    def send(self, tensor: Tensor, to: int, tag: int = 0) -> None:
        self.isend(tensor, to, tag).wait()

    def recv(self, tensor: Tensor, source: int, tag: int = 0) -> None:
        self.irecv(tensor, source, tag).wait()

    def all_gather(self, tensor: Tensor) -> Rows:
        """Start giving every rank's small CPU ``tensor`` to every rank (one-shot exchange)."""
        rows = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype)
        rows[self.rank] = tensor
        works: list[Work] = []
        for peer in self._peers():
            works.append(self.irecv(rows[peer], peer, CONTROL_TAG))
            works.append(self.isend(tensor, peer, CONTROL_TAG))
        return Rows(rows, works)

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite ``tensor`` on every rank by ``root``'s."""
        if self.rank == root:
            for work in [self.isend(tensor, peer) for peer in self._peers()]:
                work.wait()
        else:
            self.recv(tensor, root)

    def close(self, *, failed: bool = False) -> None:  # noqa: B027 (nothing to close is the common case)
        """Leave the cluster; after a failure without waiting for anyone."""

    def _peers(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank]


class Alone(Transport):
    """The transport of a world of one rank: there is nobody to talk to."""

    rank, size = 0, 1

    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        raise ValueError(f"rank 0 is alone: there is no rank {to} to send to")

    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        raise ValueError(f"rank 0 is alone: there is no rank {source} to receive from")
