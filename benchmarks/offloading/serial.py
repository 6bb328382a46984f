"""Offloading in order: what is compared with, and what the result must be equal to, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distloop.strategies.base import Options, Parameters, Strategy
from distloop.strategies.zero_offload.flat import lay_out
from distloop.strategies.zero_offload.links import Link, Mark
from distloop.transports import Alone


class Serial(Strategy):
    """Backward; gradients down; norm; Adam; values up; the next forward. One rank.

    Args:
        early: gradients go down beside backward, bucket by bucket, as DeepSpeed's do with ``overlap_comm``.
    """

    on_host = True

    def __init__(self, parameters: Parameters, options: Options, link: Link, *, early: bool = False):
        super().__init__(parameters, Alone())
        self._link, self._early = link, early
        self.buckets = lay_out(parameters, self.transport, options.bucket_bytes(parameters), options.weights)
        sizes = [len(bucket.flat) for bucket in self.buckets]
        kind = self.buckets[0].flat.dtype
        values = link.keep(sum(sizes), torch.float32).split(sizes)
        self._rounded = link.allocate(sum(sizes), kind).split(sizes)
        self._staged = torch.empty(sum(sizes), dtype=kind).split(sizes)
        self._gradients = link.allocate(sum(sizes), kind).split(sizes)
        self.shards = []
        for bucket, own, rounded in zip(self.buckets, values, self._rounded, strict=True):
            bucket.adopt(own)
            self.shards.append(bucket.segments(own, rounded))
        self._missing: list[int] = []
        self._down: list[Mark] = []
        places = [(m.parameter, i) for i, bucket in enumerate(self.buckets) for m in bucket.members]
        self._places = {p: [i for q, i in places if q is p] for p, _ in places}
        for parameter in self._places if early else ():
            parameter.register_post_accumulate_grad_hook(self._completed)

    def backward(self, loss: Tensor, weight: float, *, final: bool) -> None:
        self._missing, self._down = [len(bucket.members) for bucket in self.buckets], []
        loss.backward(self.initial_gradient(loss, weight), inputs=self._list)

    def collect(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        while len(self._down) < len(self.buckets):
            self._send_down()
        for mark in self._down:
            mark.wait()
        for i, bucket in enumerate(self.buckets):
            yield i, bucket.take(self._gradients[i])

    def settle(self) -> None:
        up = [self._link.up(self._rounded[i], bucket.own) for i, bucket in enumerate(self.buckets)]
        for mark in up:
            mark.follow()
        for parameter in self._list:
            parameter.grad = None

    def _completed(self, parameter: Tensor) -> None:
        for i in self._places[parameter]:  # type: ignore[index]
            self._missing[i] -= 1
        while len(self._down) < len(self.buckets) and not self._missing[len(self._down)]:
            self._send_down()

    def _send_down(self) -> None:
        i = len(self._down)
        self.buckets[i].fill(self._staged[i], {})
        self._down.append(self._link.down(self._staged[i], self._gradients[i]))
