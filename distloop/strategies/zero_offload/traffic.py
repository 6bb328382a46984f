"""What is on its way: gradients to their owners and down to the host, new values up and to all ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from distloop.collectives.sharded import all_gather, reduce_scatter
from distloop.errors import ConfigError, DistloopError
from distloop.strategies.lane import Lane
from distloop.strategies.zero_offload.flat import Bucket
from distloop.strategies.zero_offload.links import REACHED, Link, Mark
from distloop.strategies.zero_offload.progress import Progress
from distloop.strategies.zero_offload.stock import Stock
from distloop.strategies.zero_offload.values import IN_FLIGHT, Values, exact
from distloop.transports import Transport

SPARE = 0.5  # bytes per parameter of gradients on the host that wait while others are applied


class Traffic:
    """Everything that travels, in one order that is the same on every rank: all gradients, then all new values.

    Args:
        buckets: in the order in which they are sent.
        links: the way of each between device and host.
        values: what goes up.
        transport: to the other ranks.
        wire: dtype of gradients between ranks (None: no less precise than they are added up).
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        links: Sequence[Link],
        values: Values,
        transport: Transport,
        *,
        wire: torch.dtype | None,
    ):
        self.buckets, self._links, self._transport = buckets, links, transport
        self._alone, self._count = transport.size == 1, len(buckets)
        self._exact = [exact(bucket.flat.dtype) for bucket in buckets]
        self._wire = [wire if wire is not None and e == torch.float32 else e for e in self._exact]
        self._values = values
        self._longest = max(len(bucket.flat) for bucket in buckets)
        self._pool: dict[torch.dtype, list[Tensor]] = {}
        for dtype in dict.fromkeys(self._wire) if not self._alone else ():
            device = buckets[0].flat.device
            self._pool[dtype] = [transport.allocate(self._longest, dtype, device) for _ in range(IN_FLIGHT)]
        self._stock = Stock(int(SPARE * sum(len(bucket.own) for bucket in buckets)))
        self._lane = Lane(self._do, threaded=transport.overlaps and not self._alone)
        self._progress = Progress()
        self._changed = self._progress.changed
        self._step = 0
        self._staged: list[Tensor] = []
        self._filled: list[Mark] = []
        self._brought: list[tuple[Tensor, Mark]] = []
        self._held: dict[int, Tensor] = {}
        self._drains = False  # whether whoever takes gradients has been seen to apply none before all have arrived
        self._kept: dict[int, Tensor] = {}
        self._order: list[int] = []  # of new values between ranks: as forward needs them, so the same on all
        self._early: set[int] = set()  # those whose turn has not come
        self._up: dict[int, Mark] = {}  # those that are on the device, or will be
        self._going_up: deque[Mark] = deque()
        self._slot_free = [REACHED] * IN_FLIGHT
        self._published: dict[int, Mark] = {}
        self.pending: set[int] = set()  # buckets whose new values the model has not been seen to have

    def begin(self) -> None:
        """Begin a step, after all that is still under way."""
        self.quiet()
        with self._changed:
            self._staged, self._filled, self._brought = [], [], []
            self._order.clear()
            self._early.clear()
            self._published.clear()
            self._step += 1
            self._lane.start()

    def buffer(self, i: int, *, summed: bool) -> Tensor:
        """Return where the gradients of bucket ``i`` are to be put, once it is free.

        ``summed``: they are sums, or will be, in higher precision than the model's.
        """
        bucket, link = self.buckets[i], self._links[i]
        dtype = self._wire[i]
        if self._alone and not summed and self._wire[i] == self._exact[i]:
            dtype = bucket.flat.dtype  # as autograd has made it: nothing is lost
        if self._alone and link.direct:
            staged = self._stock.take(link, dtype, len(bucket.flat))
        else:
            if i >= IN_FLIGHT:
                self._lane.wait(i - IN_FLIGHT)
                self._brought[i - IN_FLIGHT][1].follow()
            if dtype not in self._pool:
                self._pool[dtype] = [bucket.flat.new_empty(self._longest, dtype=dtype) for _ in range(IN_FLIGHT)]
            staged = self._pool[dtype][i % IN_FLIGHT][: len(bucket.flat)]
        self._staged.append(staged)
        return staged

    def bring(self, i: int) -> None:
        """Send the gradients of bucket ``i``, which are in its buffer now."""
        with self._changed:
            self._filled.append(self._links[i].mark())
            self._announce()
        if self._alone:
            self._lane.wait(i)

    def await_sent(self) -> None:
        """Return when all that could be sent so far has been sent."""
        self._lane.wait_for_ready()

    def arrivals(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yield the summed gradients of each shard, on the host, as they arrive.

        Of those that are there, the last one first: forward needs its values first, and those before have until then.
        """
        kept, self._kept = self._kept, {}
        there: list[int] = []
        arrived = 0
        for _ in self.buckets:
            while arrived < self._count and (not there or kept or self._has_arrived(arrived)):
                self._held[arrived] = kept.pop(arrived) if kept else self._arrived(arrived)
                there.append(arrived)
                arrived += 1
            i = there.pop()
            self._slot_free[i % IN_FLIGHT].wait()
            yield i, self.buckets[i].take(self._held[i])
            if i in self._held:  # whoever takes them applies none before all have arrived
                self._drains = True
                self._stock.streams(False)

    def keep(self) -> None:
        """Add what arrives to what has arrived before, for :meth:`arrivals`."""
        for i in range(self._count):
            gradient = self._arrived(i)
            if i in self._kept:
                self._kept[i] += gradient
                self._stock.give_back(self._links[i], gradient)
            else:
                self._kept[i] = gradient

    def applied(self, i: int) -> None:
        """Say that the gradients of bucket ``i`` are needed no more."""
        self._stock.give_back(self._links[i], self._held.pop(i))
        self._progress.decide()

    def publish(self, i: int) -> None:
        """Send the new values of shard ``i`` to the device and to all ranks."""
        source = self._values.going_up(i)
        mark = REACHED if source is None else self._links[i].up(source, self.buckets[i].own)
        self._slot_free[i % IN_FLIGHT] = mark
        self._going_up.append(mark)
        if len(self._going_up) >= IN_FLIGHT:
            self._going_up.popleft().wait()  # what the next bucket is rounded into is free then
        if self._alone:
            self._arrive(i, mark)
            return
        with self._changed:
            self._published.pop(i, None)
            self._up[i] = mark
            self._early.add(i)
            while (following := self._count - 1 - len(self._order) % self._count) in self._early:
                self._early.remove(following)
                self._order.append(following)
            self._announce()

    def publish_all(self) -> None:
        """Send all values, those first that forward needs first; return when they may be changed."""
        for i in reversed(range(self._count)):
            self.publish(i)
        while self._going_up:
            self._going_up.popleft().wait()

    def open(self) -> None:
        """Say that backward has ended: from now on the model is to have the new values."""
        self.pending = set(range(self._count))

    def need(self, wanted: Collection[int]) -> None:
        """Return when the model has the new values of the ``wanted`` buckets."""
        if not self.pending:
            return
        for i in wanted:
            if i in self.pending:
                self._await_values(i)

    def updating(self, update: Callable[[], None], *, streams: bool = False) -> Callable[[], None]:
        """Return ``update``, a step's, so that those who need its values know when it has ended, and how.

        ``streams``: it runs in another thread while gradients arrive, and may apply them as they do.
        """
        self._stock.streams(streams and not self._drains)

        def run() -> None:
            try:
                update()
                self._give_back()
            finally:
                self._stock.streams(False)

        return self._progress.updating(run)

    def quiet(self) -> None:
        """Return when nothing is being sent, and the model has all values that are on their way."""
        self._progress.await_decisions()
        self.await_sent()
        self.need(list(self.pending))

    def check(self) -> None:
        """Raise what went wrong in another thread."""
        self._progress.check()

    def complete(self) -> None:
        """Return when every update has ended and the model has all new values."""
        self._progress.await_updates()
        self._give_back()
        self.quiet()

    def close(self) -> None:
        self._fail(ConfigError("the strategy is closed"))
        self._lane.close()

    def _do(self, number: int) -> None:
        """Do one thing after the other, the same on every rank: all gradients, then all values."""
        i = number if number < self._count else self._order[number - self._count]
        try:
            if number < self._count:
                self._brought.append(self._bring(i))
            else:
                with self._links[i].sending(self._up.pop(i)):
                    all_gather(self._transport, self.buckets[i].flat)
                    self._arrive(i, self._links[i].mark())
        except BaseException as failure:
            what = "reduce-scatter" if number < self._count else "all-gather"
            if isinstance(failure, DistloopError):
                where = f"step {self._step}, bucket {i + 1} of {self._count}"
                failure = type(failure)(f"{where} ({what}, {self.buckets[i].flat.nbytes:,} bytes): {failure}")
            self._fail(failure)
            raise failure from None

    def _bring(self, i: int) -> tuple[Tensor, Mark]:
        """Sum a bucket over ranks and copy this rank's part to the host."""
        bucket, link, staged = self.buckets[i], self._links[i], self._staged[i]
        if self._alone:
            if link.direct:
                return staged, REACHED
            host = self._stock.take(link, staged.dtype, len(staged))
            with link.sending(self._filled[i]):
                return host, link.down(staged, host)
        host = self._stock.take(link, self._exact[i] if link.direct else staged.dtype, len(bucket.own))
        with link.sending(self._filled[i]):
            if link.direct:
                reduce_scatter(self._transport, staged, host)
                return host, link.mark()
            own = staged[bucket.first : bucket.last]
            reduce_scatter(self._transport, staged, own)
            return host, link.down(own, host)

    def _arrived(self, i: int) -> Tensor:
        self._lane.wait(i)
        gradient, mark = self._brought[i]
        mark.wait()
        return gradient

    def _has_arrived(self, i: int) -> bool:
        return i < len(self._brought) and self._brought[i][1].reached()

    def _arrive(self, i: int, mark: Mark) -> None:
        with self._changed:
            self._published[i] = mark
            self._changed.notify_all()

    def _await_values(self, i: int) -> None:
        with self._changed:
            while i not in self._published and (self._progress.updates or i in self._order or i in self._early):
                self.check()
                self._changed.wait()
            mark = self._published.get(i, REACHED)  # else an overflow has ended the update before it
        mark.follow()
        self.pending.discard(i)

    def _give_back(self) -> None:
        """Give back what was not applied, because of an overflow."""
        for i in list(self._held):
            self.applied(i)

    def _announce(self) -> None:
        """Let go what can go: no new values before all gradients, so that it is the same order on every rank."""
        gradients = len(self._filled)
        self._lane.ready(gradients + (len(self._order) if gradients == self._count else 0))

    def _fail(self, failure: BaseException) -> None:
        self._stock.streams(False)
        self._progress.fail(failure)
