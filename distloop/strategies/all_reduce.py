"""Gradients in flat buckets, each summed over all ranks by an all-reduce that is plugged in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distloop.collectives import AllReduce
from distloop.errors import ConfigError
from distloop.strategies.base import Options, Parameters, Segment, Strategy
from distloop.transports import Transport


class Bucket:
    """Parameters of one dtype and device whose gradients lie side by side in one flat tensor."""

    def __init__(self, members: Parameters):
        first = next(iter(members.values()))
        self.shard = [Segment(name, p, 0, p.numel(), p.detach()) for name, p in members.items()]
        self.flat = torch.zeros(sum(s.stop for s in self.shard), dtype=first.dtype, device=first.device)
        sizes = [segment.stop for segment in self.shard]
        # With the parameter's own strides (channels_last, say): optimizers walk both side by side in memory.
        self.gradients = [
            part.as_strided(s.parameter.shape, s.parameter.stride(), part.storage_offset())
            for part, s in zip(self.flat.split(sizes), self.shard, strict=True)
        ]
        for segment, view in zip(self.shard, self.gradients, strict=True):
            segment.parameter.grad = view

    def check(self) -> None:
        """Raise if a gradient was moved out of the bucket: what is sent would not be what was computed."""
        for segment, view in zip(self.shard, self.gradients, strict=True):
            if segment.parameter.grad is not view:
                raise ConfigError(
                    f"the gradient of parameter {segment.name!r} no longer lies in its bucket: something replaced it "
                    "or set it to None (zero_grad()?), or two learners have it; distloop clears gradients itself"
                )


class BucketedAllReduce(Strategy):
    """Every rank gets the sum of every bucket and updates its replica."""

    def __init__(self, parameters: Parameters, transport: Transport, options: Options, all_reduce: AllReduce):
        super().__init__(parameters, transport)
        self._all_reduce = all_reduce
        self.buckets = [Bucket(members) for members in fill(parameters, options.bucket_bytes(parameters))]
        self.shards = [bucket.shard for bucket in self.buckets]

    def backward(self, loss: Tensor, weight: float, *, final: bool) -> None:
        loss.backward(self.initial_gradient(loss, weight), inputs=self._list)

    def collect(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        for bucket in self.buckets:
            bucket.check()
        for i, bucket in enumerate(self.buckets):
            self._all_reduce(self.transport, bucket.flat)
            yield i, bucket.gradients

    def settle(self) -> None:
        for bucket in self.buckets:
            bucket.flat.zero_()


def fill(parameters: Parameters, capacity: int) -> list[Parameters]:
    """Deal parameters into buckets of at most ``capacity`` bytes (a larger parameter has one of its own).

    In reverse order of definition, because backward makes the last layer's gradients first.
    """
    buckets: list[dict[str, torch.nn.Parameter]] = []
    kind, room = None, 0
    for name, p in reversed(list(parameters.items())):
        size = p.numel() * p.element_size()
        if (p.dtype, p.device) != kind or size > room:
            buckets.append({})
            kind, room = (p.dtype, p.device), capacity
        buckets[-1][name] = p
        room -= size
    return list(buckets)
