"""Which algorithm collects which bucket, and how large buckets are."""

from __future__ import annotations

import torch

from distloop.collectives import ALL_REDUCE, with_wire
from distloop.collectives.auto import Auto, calibrate
from distloop.strategies.all_reduce import BucketedAllReduce
from distloop.strategies.base import Options, Parameters
from distloop.strategies.buckets import Capacity
from distloop.transports import Transport

WIRE = {"bf16": torch.bfloat16}
SMALLEST, LARGEST = 256 * 1024, 25 * 2**20  # bytes of a bucket that is chosen by measuring


def fixed(name: str, parameters: Parameters, transport: Transport, options: Options) -> BucketedAllReduce:
    """Return the strategy that collects all buckets by one algorithm."""
    wire = WIRE.get(options.wire_dtype)
    all_reduce = ALL_REDUCE[name] if wire is None else with_wire(name, wire)
    capacity = Capacity(options.bucket_bytes(parameters))
    return BucketedAllReduce(parameters, transport, options, lambda _: (name, all_reduce), capacity)


def fastest(parameters: Parameters, transport: Transport, options: Options) -> BucketedAllReduce:
    """Return the strategy that collects each bucket by what is fastest for its size, as measured here."""
    device = next(iter(parameters.values())).device
    wire = WIRE.get(options.wire_dtype)
    if not isinstance(transport.calibrated, Auto):
        transport.calibrated = calibrate(transport, wire=wire, device=device, refresh=options.calibration == "fresh")
    auto = transport.calibrated
    capacity = Capacity(options.bucket_bytes(parameters))
    if options.bucket_mb is None and device.type == "cpu":
        capacity = sizes(auto, sum(p.numel() * p.element_size() for p in parameters.values()))
    return BucketedAllReduce(parameters, transport, options, auto.choose, capacity)


def sizes(auto: Auto, total: int) -> Capacity:
    """Return how large buckets should be for gradients of ``total`` bytes.

    As small as can be while the latency of each is a twentieth of its time: then more of them travel while backward
    still runs. The first and the last, for which others wait, may lose half of theirs to it.
    """
    most = min(max(auto.costs.size_for(waste=0.05), SMALLEST), LARGEST)
    least = max(min(auto.costs.size_for(waste=0.5), most // 2), SMALLEST // 4)
    return Capacity(most, least) if total > most else Capacity(most)
