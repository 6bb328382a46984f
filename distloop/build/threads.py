"""How many threads a rank computes with, and which cores it keeps to: what it has is said, and shared fairly."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distloop.config import Config
from distloop.cores import Cores, bind, bindings, chosen_threads, node_of_device, shares
from distloop.errors import WorldError
from distloop.messages import gather_json
from distloop.transports import Transport
from distloop.transports.hosts import host
from distloop.world import World


def take_cores(config: Config, world: World, transport: Transport, device: torch.device) -> str:
    """Share the cores of each host among its ranks, bind them if that is wanted, and set this rank's threads.

    Every rank calls it. Returns what came of it, in words.

    Raises:
        WorldError: ``world.bind: cores`` cannot be had.
    """
    own = Cores.of_this_process(world).as_json() | {"host": host(), "node": _node(device)}
    rows = gather_json(transport, own)
    places = [rank for rank, row in enumerate(rows) if row["host"] == own["host"]]
    of_ranks = [Cores.from_json(rows[rank]) for rank in places]
    note = ""
    if config.world.bind != "none":
        least = 2 if config.world.bind == "auto" else 1  # with one, what communicates keeps the rank from computing
        parts = bindings(of_ranks, [rows[rank]["node"] for rank in places], least=least)
        if not isinstance(parts, str):
            bind(parts[places.index(world.rank)])
            note = "each bound to its own"
        elif config.world.bind == "cores" and len(places) > 1 and not _apart(of_ranks):
            raise WorldError(f"world.bind: ranks cannot have cores of their own: {parts}", everywhere=True)
    return set_threads(config, world, of_ranks, note, places.index(world.rank))


def set_threads(config: Config, world: World, of_ranks: Sequence[Cores], note: str = "", place: int = 0) -> str:
    """Set the threads of torch on this rank, which is at ``place`` among those of its host; return them in words."""
    threads, reason = config.world.threads, "world.threads"
    if threads is None and config.train.deterministic:
        threads, reason = 1, "train.deterministic"  # bits depend on how many
    if threads is None:  # what torch has now may be the choice of a run before in this process
        threads, reason = chosen_threads(world), "OMP_NUM_THREADS"
    if threads is None:
        threads, reason = shares(of_ranks)[place], ""
    torch.set_num_threads(threads)
    every = {core for cores in of_ranks for core in cores.cores}
    ranks, cores = len(of_ranks), f"{len(every)} core{'s' if len(every) > 1 else ''}"
    limits = [f"the time of {cores.quota:g}" for cores in of_ranks[place : place + 1] if cores.quota is not None]
    here = "" if ranks == world.size else " on this host"
    told = [cores, *limits, *([f"{ranks} rank{'s' if ranks > 1 else ''}{here}"] if world.size > 1 else [])]
    inside = "; ".join(part for part in (reason and f"by {reason}", ", ".join(told), note) if part)
    return f"{threads}{' per rank' if world.size > 1 else ''} ({inside})"


def _apart(of_ranks: Sequence[Cores]) -> bool:
    """Return whether every rank has cores of its own already."""
    cores = [core for own in of_ranks for core in own.cores]
    return len(cores) == len(set(cores))


def _node(device: torch.device) -> int | None:
    """Return the memory node that a GPU is at."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    parts = [getattr(found, f"pci_{name}_id", -1) for name in ("domain", "bus", "device")]
    return None if -1 in parts else node_of_device("{:04x}:{:02x}:{:02x}.0".format(*parts))
