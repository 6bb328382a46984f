"""Which device is a rank's."""

from __future__ import annotations

import os

import torch

from distloop.errors import WorldError
from distloop.world import World

SHOWN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def visible_gpus(wanted: str) -> int:
    """Return how many GPUs torch sees, if ``world.device`` wants any."""
    return 0 if wanted == "cpu" else torch.cuda.device_count()


def own_device(world: World, gpus: int) -> torch.device:
    """Return where a rank of this process's host computes, which sees so many GPUs.

    Raises:
        WorldError: there are GPUs, and none for this rank.
    """
    if not gpus:
        return torch.device("cpu")
    # A scheduler may show each rank its own GPU alone; it is number 0 to all of them then. Ranks of which nobody says
    # which share a host have no number there, and a host with one GPU is for one of them.
    alone = gpus == 1 and (not world.host_known or any(name in os.environ for name in SHOWN))
    index = 0 if alone else world.local_rank
    if index >= gpus:
        raise WorldError(
            f"local rank {world.local_rank} has no GPU of its own, this host has {gpus}: start at most {gpus} ranks "
            "per host, or set world.device to cpu"
        )
    return torch.device("cuda", index)
