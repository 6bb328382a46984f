"""What a user may want to see of the options before the training."""

from __future__ import annotations

from distloop.strategies.base import Options


def in_words(options: Options) -> str:
    """Return the options in one line."""
    said = ["optimizer in the host's memory"]
    if options.device_fraction:
        said.append(f"but for {options.device_fraction:.0%}")
    if options.weights is not None:
        said.append(f"model in {str(options.weights).removeprefix('torch.')}")
    if options.accumulate == "shard":
        said.append("accumulating on the shard")
    if options.delayed_update:
        said.append("updates delayed by a step")
    return ", ".join(said)
