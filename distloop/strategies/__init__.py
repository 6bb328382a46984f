"""Strategies: how gradients are collected and new values shared. A new one is one entry in ``STRATEGIES``."""

from collections.abc import Callable

from distloop.strategies.base import Options, Parameters, Recipe, Segment, Shard, Strategy
from distloop.transports import Transport

Make = Callable[[Parameters, Transport, Options, Recipe | None], Strategy]


def _single(parameters: Parameters, transport: Transport, options: Options, _: Recipe | None) -> Strategy:
    from distloop.strategies.single import Single

    return Single(parameters, transport, options)


def _ddp(parameters: Parameters, transport: Transport, options: Options, _: Recipe | None) -> Strategy:
    from distloop.strategies.ddp import DDP

    return DDP(parameters, transport, options)


def _naive(parameters: Parameters, transport: Transport, options: Options, _: Recipe | None) -> Strategy:
    from distloop.strategies.plans import fixed

    return fixed("naive_pipelined", parameters, transport, options)


def _ring(parameters: Parameters, transport: Transport, options: Options, _: Recipe | None) -> Strategy:
    from distloop.strategies.plans import fixed

    return fixed("ring", parameters, transport, options)


def _direct(parameters: Parameters, transport: Transport, options: Options, _: Recipe | None) -> Strategy:
    from distloop.strategies.plans import fixed

    return fixed("direct", parameters, transport, options)


def _auto(parameters: Parameters, transport: Transport, options: Options, _: Recipe | None) -> Strategy:
    from distloop.strategies.plans import fastest

    return fastest(parameters, transport, options)


def _tree(parameters: Parameters, transport: Transport, options: Options, _: Recipe | None) -> Strategy:
    from distloop.strategies.tree import Tree

    return Tree(parameters, transport, options)


def _zero_offload(parameters: Parameters, transport: Transport, options: Options, recipe: Recipe | None) -> Strategy:
    from distloop.strategies.zero_offload import ZeroOffload

    return ZeroOffload(parameters, transport, options)


def _deepspeed(parameters: Parameters, transport: Transport, options: Options, recipe: Recipe | None) -> Strategy:
    from distloop.strategies.deepspeed import DeepSpeed

    if recipe is None:
        raise ValueError("strategy deepspeed updates by itself: it needs a recipe")
    return DeepSpeed(parameters, transport, options, recipe)


# What a configuration may name. ``single`` is not among them: it is what most of them come to on one rank.
STRATEGIES: dict[str, Make] = {
    "ddp": _ddp,
    "naive": _naive,
    "ring": _ring,
    "direct": _direct,
    "auto": _auto,
    "tree": _tree,
    "zero_offload": _zero_offload,
    "deepspeed": _deepspeed,
}
ALSO_ALONE = {"tree", "zero_offload", "deepspeed"}  # what they do is worth having on one rank too
BY_LEAVES = "tree"  # adds parts of a global batch that do not depend on the number of ranks
BY_TORCH = {"ddp", "deepspeed"}  # leave the sending of gradients to torch.distributed itself
WITH_COPIES = {"zero_offload", "deepspeed"}  # can train a model in half precision, by copies of it in fp32
CUTTING = {"zero_offload", "deepspeed"}  # a rank's optimizer has cuts of parameters, not all of any
# Which options each reads.
EVERY_OPTION = {"bucket_mb", "unused_parameters"}
OPTIONS = {
    "direct": {"wire_dtype"},
    "auto": {"wire_dtype", "calibration"},
    "zero_offload": {"wire_dtype", "accumulate", "device_fraction", "delayed_update", "cpu_adam"},
    "deepspeed": {"stage", "offload", "cpu_adam", "deepspeed"},
}


def make(
    name: str, parameters: Parameters, transport: Transport, options: Options, recipe: Recipe | None = None
) -> Strategy:
    """Return the named strategy for these ranks; with one rank most of them have nothing to collect.

    Strategies that update by themselves do it by ``recipe``.
    """
    chosen = STRATEGIES[name] if transport.size > 1 or name in ALSO_ALONE else _single
    return chosen(parameters, transport, options, recipe)


def check(name: str, options: Options) -> None:
    """Refuse, before the ranks meet, what the named strategy cannot do with these options.

    Raises:
        ConfigError: something it needs is not installed, or a key is wrong.
    """
    if name == "deepspeed":
        from distloop.strategies.deepspeed.settings import check_options

        check_options(options)


def torch_collects(name: str) -> bool:
    """Return whether the named strategy leaves the sending of gradients to torch.distributed itself."""
    return name in BY_TORCH


def has_copies(name: str) -> bool:
    """Return whether the named strategy can train a model in half precision, with copies in fp32."""
    return name in WITH_COPIES


def cuts_parameters(name: str) -> bool:
    """Return whether a rank's optimizer has parts of parameters, so that it must look at each element by itself."""
    return name in CUTTING


def by_leaves(name: str) -> bool:
    """Return whether the named strategy adds gradients by leaf, to the same bits on any number of ranks."""
    return name == BY_LEAVES


def options_of(name: str) -> set[str]:
    """Return the options that the named strategy reads."""
    return EVERY_OPTION | OPTIONS.get(name, set())


__all__ = [
    "BY_LEAVES",
    "STRATEGIES",
    "Options",
    "Parameters",
    "Recipe",
    "Segment",
    "Shard",
    "Strategy",
    "by_leaves",
    "check",
    "has_copies",
    "make",
    "options_of",
    "torch_collects",
]
