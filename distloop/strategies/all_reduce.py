"""Gradients in flat buckets, each summed over all ranks by an all-reduce that is plugged in, while backward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from distloop.collectives import AllReduce
from distloop.errors import ConfigError, DistloopError
from distloop.messages import agree_on
from distloop.strategies.base import Options, Parameters, Segment, Strategy
from distloop.strategies.buckets import Capacity, fill
from distloop.strategies.lane import Lane
from distloop.transports import Transport

Choose = Callable[[Tensor], tuple[str, AllReduce]]  # the algorithm for a bucket, and its name


class Bucket:
    """Parameters of one dtype and device whose gradients lie side by side in one flat tensor."""

    def __init__(self, members: Parameters, transport: Transport):
        first = next(iter(members.values()))
        self.shard = [Segment(name, p, 0, p.numel(), p.detach()) for name, p in members.items()]
        self.flat = transport.allocate(sum(s.stop for s in self.shard), first.dtype, first.device)
        sizes = [segment.stop for segment in self.shard]
        # With the parameter's own strides (channels_last, say): optimizers walk both side by side in memory.
        self.gradients = [
            part.as_strided(s.parameter.shape, s.parameter.stride(), part.storage_offset())
            for part, s in zip(self.flat.split(sizes), self.shard, strict=True)
        ]
        for segment, view in zip(self.shard, self.gradients, strict=True):
            segment.parameter.grad = view
        self.missing = len(self.shard)  # gradients that the final backward has not completed yet
        self.sent: torch.cuda.Event | None = None

    def check(self) -> None:
        """Raise if a gradient was moved out of the bucket: what is sent would not be what was computed."""
        for segment, view in zip(self.shard, self.gradients, strict=True):
            if segment.parameter.grad is not view:
                raise ConfigError(
                    f"the gradient of parameter {segment.name!r} no longer lies in its bucket: something replaced it "
                    "or set it to None (zero_grad()?), or two learners have it; distloop clears gradients itself"
                )


class BucketedAllReduce(Strategy):
    """Every rank gets the sum of every bucket and updates its replica.

    Buckets leave in one order, the same on every rank, each as soon as the final backward has completed it and those
    before it; they arrive one by one at the optimizer. What no loss has reached is sent as zeros.
    """

    def __init__(
        self, parameters: Parameters, transport: Transport, options: Options, choose: Choose, capacity: Capacity
    ):
        super().__init__(parameters, transport)
        groups = fill(parameters, capacity)
        outlines = [_outline(members) for members in groups]
        self._algorithms = [choose(outline) for outline in outlines]
        self.plan = [
            f"{len(outline)} {str(outline.dtype).removeprefix('torch.')} by {name}"
            for outline, (name, _) in zip(outlines, self._algorithms, strict=True)
        ]
        agree_on(transport, {"buckets": self.plan}, "how gradients are collected")  # before memory is shared for them
        self.buckets = [Bucket(members, transport) for members in groups]
        self.shards = [bucket.shard for bucket in self.buckets]
        self._step, self._final, self._complete = 0, False, 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        overlaps = transport.overlaps and transport.size > 1 and len(self.buckets) > 1
        self._lane = Lane(self._send, threaded=overlaps)
        self._stream = torch.cuda.Stream() if self.buckets[0].flat.is_cuda else None
        self._starts: list[torch.cuda.Event | None] = [None] * len(self.buckets)
        if overlaps:
            for i, bucket in enumerate(self.buckets):
                completed = partial(self._completed, i)
                self._hooks += [s.parameter.register_post_accumulate_grad_hook(completed) for s in bucket.shard]

    def backward(self, loss: Tensor, weight: float, *, final: bool) -> None:
        if final:
            self._step += 1
            self._complete = 0
            for bucket in self.buckets:
                bucket.check()  # now, before the first of them is sent
                bucket.missing = len(bucket.shard)
            self._lane.start()
            self._final = True
        try:
            loss.backward(self.initial_gradient(loss, weight), inputs=self._list)
        finally:
            self._final = False

    def collect(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        self._mark(self._complete, len(self.buckets))
        self._lane.ready(len(self.buckets), soon_awaited=True)
        for i, bucket in enumerate(self.buckets):
            self._lane.wait(i)
            self._arrive(bucket)
            yield i, bucket.gradients

    def settle(self) -> None:
        self._lane.wait(len(self.buckets) - 1)  # an overflow may have ended the stream; the ranks still do the same
        for bucket in self.buckets:
            self._arrive(bucket)
            bucket.flat.zero_()

    def close(self) -> None:
        self._lane.close()
        for hook in self._hooks:
            hook.remove()

    def _completed(self, i: int, parameter: Tensor) -> None:
        """Note that backward has added its last to a parameter's gradient; send what can be sent."""
        if not self._final:
            return
        if i < self._complete:
            raise ConfigError(
                f"step {self._step}: a gradient in bucket {i + 1} grew after the bucket had left: backward added to "
                "one in several goes, as a backward inside backward does; make the loss without that"
            )
        self.buckets[i].missing -= 1
        first, last = self._complete, len(self.buckets)
        while self._complete < last and self.buckets[self._complete].missing <= 0:
            self._complete += 1
        if self._complete > first:
            self._mark(first, self._complete)
            self._lane.ready(self._complete, soon_awaited=self._complete == last)

    def _arrive(self, bucket: Bucket) -> None:
        """Let what the caller does next on the GPU wait for the bucket's sum."""
        if bucket.sent is not None:
            torch.cuda.current_stream().wait_event(bucket.sent)

    def _mark(self, first: int, last: int) -> None:
        """Note where backward's stream is, for the thread that sends to wait for."""
        if self._stream is not None:
            event = torch.cuda.current_stream().record_event()
            self._starts[first:last] = [event] * (last - first)

    def _send(self, i: int) -> None:
        bucket, (name, all_reduce) = self.buckets[i], self._algorithms[i]
        bucket.check()
        try:
            if self._stream is None:
                all_reduce(self.transport, bucket.flat)
                return
            start = self._starts[i]
            assert start is not None
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(start)
                all_reduce(self.transport, bucket.flat)
                bucket.sent = self._stream.record_event()
        except DistloopError as failure:
            where = f"step {self._step}, bucket {i + 1} of {len(self.buckets)}"
            raise type(failure)(f"{where} ({name}, {bucket.flat.nbytes:,} bytes): {failure}") from failure


def _outline(members: Parameters) -> Tensor:
    """Return a tensor as a bucket of these parameters will have it, but without memory."""
    first = next(iter(members.values()))
    return torch.empty(sum(p.numel() for p in members.values()), dtype=first.dtype, device="meta")
