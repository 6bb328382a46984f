"""Messages between ranks of one host: queues of bytes in memory that they share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from distloop import native
from distloop.errors import WorldError
from distloop.transports.base import Shared, Transport
from distloop.transports.shared_memory import LINE, RefusedError, SharedMemory
from distloop.transports.streams import StreamTransport

QUEUE = 512 * 1024  # bytes from one rank to another


class QueueStream:
    """The two queues between two ranks; see :class:`distloop.transports.streams.Stream`."""

    def __init__(self, library: ctypes.CDLL, outgoing: int, incoming: int, peers_bell: int):
        self._library, self._outgoing, self._incoming, self._bell = library, outgoing, incoming, peers_bell

    def write(self, parts: Sequence[memoryview]) -> int:
        return self._move(self._library.dl_queue_write, self._outgoing, parts)

    def read(self, parts: Sequence[memoryview]) -> int:
        return self._move(self._library.dl_queue_read, self._incoming, parts)

    def _move(self, function: Callable[..., int], queue: int, parts: Sequence[memoryview]) -> int:
        total = 0
        for part in parts:
            n = int(function(queue, ctypes.addressof(ctypes.c_char.from_buffer(part)), part.nbytes, self._bell))
            total += n
            if n < part.nbytes:
                break
        return total


class QueueTransport(StreamTransport):
    """Queues between ranks of one host that have met over another transport, ``below``, which shares memory.

    Raises:
        WorldError: the ranks are on several hosts, or do not share memory.
    """

    def __init__(self, below: Transport, timeout: float):
        shared = below.shared
        if not isinstance(shared, SharedMemory) or len(shared.ranks) != below.size:
            raise WorldError("shared memory is for ranks that share one host, and for hosts that let them")
        library = _declared(native.load("shared_memory"))
        try:
            self._memory = shared.map(LINE + QUEUE * below.size)  # a bell, and a queue for each rank to this one
        except RefusedError as refusal:
            raise WorldError(str(refusal)) from refusal
        rank, starts = below.rank, self._memory.addresses
        for source in range(below.size):
            library.dl_queue_init(starts[rank] + LINE + QUEUE * source, QUEUE)
        streams = {
            peer: QueueStream(
                library, starts[peer] + LINE + QUEUE * rank, starts[rank] + LINE + QUEUE * peer, starts[peer]
            )
            for peer in below.peers()
        }
        super().__init__(below, streams, timeout)
        self.shared: Shared | None = shared
        self._shared: SharedMemory = shared
        self._library: ctypes.CDLL = library
        self._own_bell: int = starts[rank]
        self._seen: int = library.dl_bell(self._own_bell)
        shared.barrier()  # nobody writes to a queue that is not ready

    def idle(self, seconds: float) -> None:
        seen, self._seen = self._seen, self._library.dl_bell(self._own_bell)
        if seen == self._seen:  # nothing has come since the last look, and all that had come was moved then
            if self._library.dl_wait(self._own_bell, seen, self._shared.spins, int(seconds * 1e9)):
                self._shared.peers.check()
            self._seen = self._library.dl_bell(self._own_bell)

    def close_streams(self) -> None:
        """The memory goes with this object."""


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    library.dl_queue_init.argtypes = [pointer, long]
    for move in (library.dl_queue_write, library.dl_queue_read):
        move.argtypes, move.restype = [pointer, pointer, long, pointer], long
    library.dl_bell.argtypes, library.dl_bell.restype = [pointer], ctypes.c_uint32
    library.dl_wait.argtypes = [pointer, ctypes.c_uint32, ctypes.c_int, long]
    return library
