"""Messages over streams of bytes, one each way between any two ranks: TCP connections, or queues in shared memory.

A message leaves at once, without asking whether its receiver is ready, so that it arrives after one latency of the
network; gloo, MPI and NCCL ask first with large ones, which makes it two or three.
"""

from __future__ import annotations

import struct
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from distloop.errors import MismatchError, RankHungError
from distloop.transports.base import CONTROL_TAG, Rows, Transport, Work

if TYPE_CHECKING:
    import torch.distributed as dist

HEADER = struct.Struct("<QQ")  # number of the message in its stream, bytes that follow


class Stream(Protocol):
    """Bytes from and to one peer. Nothing waits; zero says that nothing could be moved now."""

    def write(self, parts: Sequence[memoryview]) -> int:
        """Take bytes from the parts, in order; return how many. Raises RankDiedError."""

    def read(self, parts: Sequence[memoryview]) -> int:
        """Put bytes into the parts, in order; return how many. Raises RankDiedError."""


class _Message:
    """What is left of a header and its payload."""

    __slots__ = ("done", "header", "left", "number", "parts", "size", "tensor")

    def __init__(self, tensor: Tensor, number: int, header: bytes | None):
        self.tensor, self.number = tensor, number
        payload = memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self.header = bytearray(HEADER.size) if header is None else bytearray(header)
        self.parts = [memoryview(self.header), payload] if payload.nbytes else [memoryview(self.header)]
        self.size = payload.nbytes
        self.left = HEADER.size + self.size
        self.done = False

    def advance(self, moved: int) -> None:
        self.left -= moved
        self.done = not self.left
        if self.done:
            self.parts = []
            return
        while moved:
            if moved < self.parts[0].nbytes:
                self.parts[0] = self.parts[0][moved:]
                return
            moved -= self.parts.pop(0).nbytes


class _Pending:
    """A message under way."""

    def __init__(self, transport: StreamTransport, message: _Message, peer: int, verb: str):
        self._transport, self._message, self._peer, self._verb = transport, message, peer, verb

    def wait(self) -> None:
        if not self._message.done:
            self._transport.progress(self._message, self._peer, self._verb)


class StreamTransport(Transport):
    """Gradients over streams; control messages go over the transport by which the ranks met.

    Streams are for one thread at a time: whoever collects gradients.
    """

    eager = True

    def __init__(self, below: Transport, streams: Mapping[int, Stream], timeout: float):
        self.rank, self.size, self.hosts, self.library = below.rank, below.size, below.hosts, below.library
        self._below, self._streams, self._timeout = below, streams, timeout
        self._out: dict[int, deque[_Message]] = {peer: deque() for peer in streams}
        self._in: dict[int, deque[_Message]] = {peer: deque() for peer in streams}
        self._sent, self._posted = dict.fromkeys(streams, 0), dict.fromkeys(streams, 0)

    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        if tag == CONTROL_TAG:
            return self._below.isend(tensor, to, tag)
        number = self._sent[to]
        self._sent[to] = number + 1
        message = _Message(tensor, number, HEADER.pack(number, tensor.nbytes))
        self._out[to].append(message)
        self._write(to)
        return _Pending(self, message, to, "send to")

    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        if tag == CONTROL_TAG:
            return self._below.irecv(tensor, source, tag)
        message = _Message(tensor, self._posted[source], None)
        self._posted[source] += 1
        self._in[source].append(message)
        return _Pending(self, message, source, "hear from")

    def all_gather(self, tensor: Tensor) -> Rows:
        return self._below.all_gather(tensor)

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        self._below.broadcast(tensor, root)

    def process_group(self) -> dist.ProcessGroup:
        return self._below.process_group()

    def close(self, *, failed: bool = False) -> None:
        try:
            if not failed:
                # A peer that still waits must not see this rank's end as its death.
                self.all_gather(torch.zeros(1)).wait()
        finally:
            self.close_streams()
        self._below.close(failed=failed)

    def progress(self, message: _Message, peer: int, verb: str) -> None:
        """Move bytes of all messages until ``message`` is complete."""
        last = time.monotonic()
        while not message.done:
            if self.pump():
                last = 0.0
            elif not message.done:
                now = time.monotonic()
                last = last or now
                if now - last > self._timeout:
                    raise RankHungError(self._silence(peer, verb))
                self.idle(min(self._timeout, 0.1))

    def pump(self) -> bool:
        """Move what can be moved now; return whether there was anything."""
        moved = False
        for other, queue in self._out.items():
            if queue:
                moved |= self._write(other)
        for other, queue in self._in.items():
            if queue:
                moved |= self._read(other)
        return moved

    def waits_to(self) -> tuple[list[int], list[int]]:
        """Return the peers that something is to be written to, and those that something is to be read from."""
        return [p for p, queue in self._out.items() if queue], [p for p, queue in self._in.items() if queue]

    @abstractmethod
    def idle(self, seconds: float) -> None:
        """Return when a stream may have become ready, after ``seconds`` at the latest. Raises RankDiedError."""

    @abstractmethod
    def close_streams(self) -> None:
        """Let go of what the streams are made of."""

    def _write(self, to: int) -> bool:
        queue, stream, moved = self._out[to], self._streams[to], False
        while queue:
            message = queue[0]
            n = stream.write(message.parts)
            if not n:
                break
            moved = True
            message.advance(n)
            if not message.done:
                break
            queue.popleft()
        return moved

    def _read(self, source: int) -> bool:
        queue, stream, moved = self._in[source], self._streams[source], False
        while queue:
            message = queue[0]
            n = stream.read(message.parts)
            if not n:
                break
            moved = True
            message.advance(n)
            if message.left <= message.size:  # the header is complete
                self._check(message, source)
            if not message.done:
                break
            queue.popleft()
        return moved

    def _check(self, message: _Message, source: int) -> None:
        number, size = HEADER.unpack(message.header)
        if (number, size) != (message.number, message.size):
            expected = f"message {message.number} of {message.size} bytes"
            raise MismatchError(
                f"rank {self.rank} expected {expected} from rank {source}, "
                f"which sent message {number} of {size} bytes: the ranks do not do the same"
            )

    def _silence(self, peer: int, verb: str) -> str:
        late = [p for p, queue in self._in.items() if queue] or [peer]
        names = f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late))}"
        return f"rank {self.rank} waited {self._timeout:g} s to {verb} rank {peer}; not heard from: {names}"
