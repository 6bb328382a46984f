"""Where a rank computes, and how it reaches the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distloop.build.deterministic import leaves_of
from distloop.build.device import own_device, visible_gpus
from distloop.build.threads import set_threads, take_cores
from distloop.config import Config
from distloop.cores import Cores
from distloop.errors import WorldError
from distloop.messages import agree_on
from distloop.strategies import torch_collects
from distloop.strategies.tree import refuse_more_ranks
from distloop.transports import Alone, Transport
from distloop.world import World


@dataclass(frozen=True)
class Place:
    """Where a rank computes and how it reaches the others."""

    world: World
    transport: Transport
    device: torch.device
    notes: tuple[str, ...] = ()  # on what was not to be had
    threads: str = ""  # of torch, in words


def make_place(
    config: Config, world: World, transport: Transport | None = None, facts: Mapping[str, Any] | None = None
) -> Place:
    """Choose the device and the threads, and join the other ranks, unless a ``transport`` reaches them already.

    ``facts`` are what must be the same on all of them.

    Raises:
        WorldError: what was asked for is not there.
    """
    from distloop.transports.process_group import nccl_unusable

    wanted = config.world
    gpus = visible_gpus(wanted.device)
    if wanted.device == "cuda" and not gpus:
        raise WorldError(
            f"world.device: cuda was asked for, but torch {torch.__version__} sees no GPU here", everywhere=True
        )
    if wanted.backend == "nccl" and not gpus:
        raise WorldError(f"world.backend: {nccl_unusable()}", everywhere=True)
    device = own_device(world, gpus)
    if gpus:
        torch.cuda.set_device(device)
    if config.train.deterministic:
        refuse_more_ranks(world.size, leaves_of(config))
    notes: list[str] = []
    if transport is None and world.size > 1:
        transport, notes = _join(world, config, device, facts or {})
        threads = take_cores(config, world, transport, device)
    else:
        transport = transport or Alone()
        threads = set_threads(config, world, [Cores.of_this_process(world)] * world.local_size)
    # Ranks that meet at an address have been asked, those of MPI and of a run before in the same process have not.
    agree_on(transport, facts or {}, "what they were started with", error=WorldError)
    return Place(world, transport, device, tuple(notes), threads)


def _join(world: World, config: Config, device: torch.device, facts: Mapping[str, Any]) -> tuple[Transport, list[str]]:
    from distloop.transports.join import join

    wanted = config.world
    return join(
        world,
        wanted.transport,
        backend=wanted.backend,
        device=device,
        timeout=wanted.timeout,
        share_memory=wanted.shared_memory,
        torch_collects=torch_collects(config.strategy.name),
        facts=facts,
    )
