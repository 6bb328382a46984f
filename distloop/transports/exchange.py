"""What lies between ranks that are threads: messages under way, who waits for which, and who has failed."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

from torch import Tensor

from distloop.errors import RankDiedError, RankHungError
from distloop.transports.baton import Baton

Channel = tuple[int, int, int]  # source, destination, tag
Ticket = tuple[Channel, int]  # the n-th message of a channel
Delay = Callable[[int, int, int, int], float]  # of source, destination, tag and bytes, in seconds


class Exchange:
    """The messages of one run. Every method may be called by any thread.

    Args: see :class:`distloop.transports.threads.ThreadCluster`.
    """

    def __init__(
        self,
        size: int,
        timeout: float,
        *,
        ordered: bool,
        delay: Delay | None,
        failures: Mapping[int, int],
        silent: Mapping[int, int],
    ):
        self.size, self.timeout = size, timeout
        self.errors: dict[int, BaseException] = {}  # by rank, in the order in which they failed
        self._delay, self._failures, self._silent = delay, failures, silent
        self._lock = threading.Lock()
        self._arrived = [threading.Condition(self._lock) for _ in range(size)]
        self._messages: dict[Ticket, tuple[Tensor, float]] = {}  # with the time from which on they are there
        # The n-th receive posted on a channel gets the n-th message sent on it, in whatever order they are waited for.
        self._sent: Counter[Channel] = Counter()
        self._posted: Counter[Channel] = Counter()
        self._sent_by = [0] * size
        self._latest: dict[Channel, float] = {}
        self._waiting: list[list[Ticket]] = [[] for _ in range(size)]  # by rank
        self._ended: set[int] = set()
        self._deadlock: str | None = None
        self._baton = Baton(size, self._lock, self._can_run, self._stuck) if ordered else None

    def begin(self, rank: int) -> None:
        """Return when ``rank`` may start."""
        if self._baton is not None:
            with self._lock:
                self._baton.enter(rank)

    def end(self, rank: int, failure: BaseException | None = None) -> None:
        """Note that ``rank`` has ended; after a failure everyone who waits, or will, is told."""
        with self._lock:
            self._ended.add(rank)
            if failure is not None:
                self.errors[rank] = failure
                for arrived in self._arrived:
                    arrived.notify_all()
            if self._baton is not None:
                self._baton.leave(rank)

    def close(self) -> None:
        """Tidy up after all ranks."""
        if self._baton is not None:
            self._baton.close()

    def put(self, channel: Channel, message: Tensor) -> None:
        """Send ``message``, which nobody changes any more."""
        source, to, tag = channel
        there = 0.0
        if self._delay is not None:
            there = time.monotonic() + self._delay(source, to, tag, message.nbytes)
        with self._lock:
            self._die_if_due(source)
            self._sent_by[source] += 1
            if self._sent_by[source] > self._silent.get(source, math.inf):
                return  # lost
            if self._delay is not None:
                there = self._latest[channel] = max(there, self._latest.get(channel, 0.0))  # none overtakes another
            ticket = channel, self._sent[channel]
            self._sent[channel] += 1
            self._messages[ticket] = message, there
            if self._baton is None:
                self._arrived[to].notify_all()

    def post(self, channel: Channel) -> Ticket:
        """Reserve the next message of a channel for whoever calls."""
        with self._lock:
            self._die_if_due(channel[1])
            ticket = channel, self._posted[channel]
            self._posted[channel] += 1
            return ticket

    def take(self, ticket: Ticket) -> Tensor:
        """Return the message, as soon as it is there.

        Raises:
            RankDiedError: a rank failed, and the message is not there.
            RankHungError: it did not come within the timeout, or, in order, it cannot come any more.
        """
        (_, to, _), _ = ticket
        with self._lock:
            self._die_if_due(to)
            if ticket not in self._messages or self._delay is not None:
                self._waiting[to].append(ticket)
                try:
                    if self._baton is None:
                        self._wait_for_time(ticket)
                    else:
                        self._wait_for_turn(ticket, self._baton)
                finally:
                    self._waiting[to].remove(ticket)
            return self._messages.pop(ticket)[0]

    def _wait_for_time(self, ticket: Ticket) -> None:
        (_, to, _), _ = ticket
        deadline = time.monotonic() + self.timeout
        while True:
            now = time.monotonic()
            there = self._messages[ticket][1] if ticket in self._messages else math.inf
            if there <= now:
                return
            if self.errors and there == math.inf:
                raise self._died(ticket)
            if now >= deadline:
                raise self._hung(ticket)
            self._arrived[to].wait(min(there, deadline) - now)

    def _wait_for_turn(self, ticket: Ticket, baton: Baton) -> None:
        while ticket not in self._messages:
            if self._deadlock is not None:
                raise RankHungError(self._deadlock)
            if self.errors:
                raise self._died(ticket)
            baton.wait(ticket[0][1])

    def _can_run(self, rank: int) -> bool:
        waiting = self._waiting[rank]
        released = self.errors or self._deadlock is not None
        return rank not in self._ended and bool(not waiting or released or any(t in self._messages for t in waiting))

    def _stuck(self) -> None:
        """Nobody can run: all have ended, or they wait for one another."""
        if len(self._ended) < self.size:
            self._deadlock = f"deadlock: {self._who_waits()}"

    def _die_if_due(self, rank: int) -> None:
        if self._failures and self._sent_by[rank] >= self._failures.get(rank, math.inf):
            raise RankDiedError(f"rank {rank} died after {self._sent_by[rank]} messages, as it was told to")

    def _died(self, ticket: Ticket) -> RankDiedError:
        (source, to, _), _ = ticket
        failed, failure = next(iter(self.errors.items()))
        why = str(failure).strip().partition("\n")[0]
        return RankDiedError(
            f"rank {to} stopped waiting for rank {source}: rank {failed} failed with {type(failure).__name__}"
            + (f": {why}" if why else "")
        )

    def _hung(self, ticket: Ticket) -> RankHungError:
        (source, to, tag), _ = ticket
        others = self._who_waits(but=ticket)
        return RankHungError(
            f"rank {to} heard nothing from rank {source} (tag {tag}) for {self.timeout:g} s"
            + (f"; {others}" if others else "")
        )

    def _who_waits(self, but: Ticket | None = None) -> str:
        return ", ".join(
            f"rank {to} waits for rank {source} (tag {tag}" + (", which has ended)" if source in self._ended else ")")
            for waiting in self._waiting
            for ((source, to, tag), number) in waiting
            if ((source, to, tag), number) != but
        )
