"""What a transport is: messages between ranks, and what some transports have beyond them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from distloop.errors import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist

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


class Shared(Protocol):
    """Memory that ranks of one host share: what is allocated in it is summed where it lies."""

    meanwhile: Callable[[], object] | None  # called now and then while waiting for a rank of this host

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks of this host, in order."""

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return zeros that the other ranks of this host see too; every rank calls it, for tensors of one size."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace ``tensor``, which is contiguous, on the ranks of this host by their sum, added in rank order."""

    def pieces(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return the parts in which the next two take ``tensor``, a flat one."""

    def holds(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` was allocated here; then any part of it may be taken, several at a time."""

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum this rank's slice of ``tensor`` over the ranks of this host; return the slice, a view."""

    def all_gather(self, tensor: Tensor) -> None:
        """Complete ``tensor`` by the slices of the other ranks of this host."""

    def barrier(self) -> None:
        """Return when every rank of this host has come here."""

    def check(self, seconds: float = 0.0) -> None:
        """Raise RankDiedError if a rank of this host has ended, or does within ``seconds``."""

    def close(self) -> None:
        """Let go of the other ranks; what was allocated lives on."""


class Transport(ABC):
    """Point-to-point messages between ``size`` ranks, delivered in order per (source, destination, tag).

    Raises, from any wait:
        RankDiedError: a peer is gone; names it where the transport can tell.
        RankHungError: nothing came for ``timeout`` seconds; names those not heard from.
    """

    rank: int
    size: int
    hosts: Sequence[int] = ()  # by rank, the number of its host; empty where nothing is known of hosts
    overlaps = True  # whether messages with tag 0 may be sent by another thread, beside control messages
    eager = False  # whether a send is complete once the network has taken it, however late its receiver is
    shared: Shared | None = None  # with the other ranks of this host, if there is any
    calibrated: object = None  # what has been measured of it, for collectives that choose by it
    busy: Callable[[], None] | None = None  # returns when what another thread still sends with tag 0 has been sent
    library: Callable[[Tensor], None] | None = None  # the all-reduce of the library behind this transport

    @abstractmethod
    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        """Start sending ``tensor``, which is contiguous; do not change it before the work is complete."""

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
        for peer in self.peers():
            works.append(self.irecv(rows[peer], peer, CONTROL_TAG))
            works.append(self.isend(tensor, peer, CONTROL_TAG))
        return Rows(rows, works)

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite ``tensor`` on every rank by ``root``'s."""
        if self.rank == root:
            for work in [self.isend(tensor, peer) for peer in self.peers()]:
                work.wait()
        else:
            self.recv(tensor, root)

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return zeros to be all-reduced often, in memory where that costs least; every rank calls it alike."""
        if self.shared is not None and device.type == "cpu":
            return self.shared.allocate(numel, dtype)
        return torch.zeros(numel, dtype=dtype, device=device)

    def process_group(self) -> dist.ProcessGroup:
        """Return these ranks as a process group of torch.distributed.

        Raises:
            ConfigError: there is none.
        """
        raise ConfigError(
            "strategy.name: this one works over torch.distributed alone; use naive, ring, direct or auto here"
        )

    def close(self, *, failed: bool = False) -> None:  # noqa: B027 (nothing to close is the common case)
        """Leave the cluster; after a failure without waiting for anyone."""

    def peers(self) -> list[int]:
        """Return the other ranks, beginning with the one behind this: so that not everyone talks to rank 0 first."""
        return [(self.rank + i) % self.size for i in range(1, self.size)]


class Alone(Transport):
    """The transport of a world of one rank: there is nobody to talk to."""

    rank, size = 0, 1

    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        raise ValueError(f"rank 0 is alone: there is no rank {to} to send to")

    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        raise ValueError(f"rank 0 is alone: there is no rank {source} to receive from")
