"""Strategies: how gradients are collected and new values shared. A new one is one entry in ``STRATEGIES``."""

from collections.abc import Callable

from distloop.strategies.base import Options, Parameters, Segment, Shard, Strategy
from distloop.transports import Transport

Make = Callable[[Parameters, Transport, Options], Strategy]


def _single(parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    from distloop.strategies.single import Single

    return Single(parameters, transport, options)


def _ddp(parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    from distloop.strategies.ddp import DDP

    return DDP(parameters, transport, options)


def _naive(parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    from distloop.strategies.plans import fixed

    return fixed("tree" if options.deterministic else "naive_pipelined", parameters, transport, options)


def _ring(parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    from distloop.strategies.plans import fixed

    return fixed("ring", parameters, transport, options)


def _direct(parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    from distloop.strategies.plans import fixed

    return fixed("direct", parameters, transport, options)


def _auto(parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    from distloop.strategies.plans import fastest

    return fastest(parameters, transport, options)


def _zero_offload(parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    from distloop.strategies.zero_offload import ZeroOffload

    return ZeroOffload(parameters, transport, options)


# What a configuration may name. ``single`` is not among them: it is what most of them come to on one rank.
STRATEGIES: dict[str, Make] = {
    "ddp": _ddp,
    "naive": _naive,
    "ring": _ring,
    "direct": _direct,
    "auto": _auto,
    "zero_offload": _zero_offload,
}
ALSO_ALONE = {"zero_offload"}  # those that do something on one rank too
# Which options each reads.
EVERY_OPTION = {"bucket_mb", "unused_parameters"}
OPTIONS = {
    "naive": {"deterministic"},
    "direct": {"wire_dtype"},
    "auto": {"wire_dtype", "calibration"},
    "zero_offload": {"wire_dtype", "accumulate", "device_fraction", "delayed_update"},
}


def make(name: str, parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    """Return the named strategy for these ranks; with one rank there is nothing to collect."""
    replaced = transport.size == 1 and name not in ALSO_ALONE
    return (_single if replaced else STRATEGIES[name])(parameters, transport, options)


def torch_collects(name: str) -> bool:
    """Return whether the named strategy leaves the sending of gradients to torch.distributed itself."""
    return STRATEGIES[name] is _ddp


def options_of(name: str) -> set[str]:
    """Return the options that the named strategy reads."""
    return EVERY_OPTION | OPTIONS.get(name, set())


__all__ = [
    "STRATEGIES",
    "Options",
    "Parameters",
    "Segment",
    "Shard",
    "Strategy",
    "make",
    "options_of",
    "torch_collects",
]
