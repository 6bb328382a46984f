"""Training from Python: the same run that the command line makes, in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distloop.build import Builder, make_place
from distloop.build.deterministic import reproducible
from distloop.build.identity import identity
from distloop.collectives.auto import Auto
from distloop.collectives.auto import calibrate as calibrate_transport
from distloop.errors import WorldError, found_by_all
from distloop.failure import lost_peer, parting
from distloop.heartbeat import Heartbeat
from distloop.last_words import forget, remember
from distloop.layers import Setting
from distloop.records import Observer, Result
from distloop.settings import Resolved, from_environment, from_file, from_mapping, resolve
from distloop.strategies.plans import WIRE
from distloop.tasks import check_task
from distloop.transports import ThreadCluster, ThreadTransport, Transport
from distloop.world import World


def fit(
    task: Any,
    *,
    observers: Sequence[Observer] = (),
    config: str | Path | None = None,
    resume: str | Path | None = None,
    **sections: Mapping[str, Any],
) -> Result:
    """Train ``task`` and return how it went; its models are then the best ones.

    A signal (Ctrl-C, SIGTERM) ends the run, not the program: see ``Result.exit_code``. Seed torch before you build a
    model whose first weights are to be the same in every run.

    Runs alone in a plain Python process, and as one rank of many under torchrun.

    Args:
        task: what to learn, for instance a :class:`distloop.Supervised`.
        observers: called on rank 0 with every :class:`distloop.Record`; returning True asks for a stop.
        config: a configuration file to start from.
        resume: "auto" goes on in the run directory ``log.name``, if it is there; a path in that run, or from that
            checkpoint.
        sections: sections of the configuration, as in ``optimizer={"name": "sgd", "lr": 0.1}``.

    Raises:
        distloop.errors.DistloopError: with one sentence that says where, what, and what would be right.
    """
    check_task(task, "argument task")
    layers = [from_file(Path(config))] if config is not None else []
    name = from_mapping({"task": {"name": type(task).__name__}})
    for layer in layers:  # what a file says of its own task is not about this one
        for key in [key for key in layer if key.startswith("task.")]:
            del layer[key]
    asked = {} if resume is None else {"checkpoint.resume": Setting(os.fspath(resume), "argument resume")}
    resolved = resolve(name, *layers, from_environment(), from_mapping(sections), asked)
    return run(resolved, World.from_environment(), task=task, observers=observers)


def run(
    resolved: Resolved,
    world: World,
    *,
    task: Any = None,
    observers: Sequence[Observer] = (),
    transport: Transport | None = None,
) -> Result:
    """Run a resolved configuration as the rank that ``world`` says; over ``transport``, if the ranks have one."""
    with found_by_all():
        builder = Builder(resolved, task)
    place = make_place(resolved.config, world, transport, identity(resolved, task) if world.size > 1 else {})
    heartbeat = Heartbeat.begin(world, place.transport, resolved.config.world.heartbeat) if transport is None else None
    try:
        with reproducible(resolved.config):
            session = builder.session(place, observers)
            remember(session.directory, world.rank)
            result = session.run()
            if heartbeat is not None:
                heartbeat.end()
    except BaseException as failure:
        found = parting(failure, place.transport) if transport is None else failure
        if heartbeat is not None:
            heartbeat.abandon()
        place.transport.close(failed=True)
        if found is failure:
            raise
        raise found from failure
    _part(place.transport)
    forget()
    return result


def calibrate(resolved: Resolved, world: World) -> Auto:
    """Measure how fast these ranks sum gradients, by algorithm and size, and remember it for strategy ``auto``.

    Raises:
        WorldError: there is one rank, or the ranks did not find each other.
    """
    if world.size == 1:
        raise WorldError("one rank has nobody to sum gradients with: start several, as for train")
    config = resolved.config
    place = make_place(
        config.model_copy(update={"strategy": config.strategy.model_copy(update={"name": "auto"})}),
        world,
        facts=identity(resolved),
    )
    try:
        wire = WIRE.get(config.strategy.wire_dtype)
        auto = calibrate_transport(place.transport, wire=wire, device=place.device, refresh=True)
    except BaseException as failure:
        found = parting(failure, place.transport)
        place.transport.close(failed=True)
        if found is failure:
            raise
        raise found from failure
    _part(place.transport)
    return auto


def _part(transport: Transport) -> None:
    """Leave the other ranks, all of whom are done; one may die even now."""
    try:
        transport.close()
    except RuntimeError as failure:
        raise lost_peer(failure) or failure from failure


def simulate(resolved: Resolved, ranks: int, *, observers: Sequence[Observer] = ()) -> Result:
    """Run a configuration on ``ranks`` ranks that are threads of this process, one at a time; return rank 0's result.

    Every rank makes its own task, by name. Ranks run on the CPU, in the same order in every run, and stand still while
    one of them waits for a debugger.

    Raises:
        ConfigError: the configuration asks for what processes alone can do.
    """
    resolved = simulated(resolved)

    def work(transport: ThreadTransport) -> Result:
        world = World(transport.rank, ranks, transport.rank, ranks, "simulate")
        return run(resolved, world, observers=observers, transport=transport)

    return ThreadCluster(ranks, ordered=True).run(work)[0]


def simulated(resolved: Resolved) -> Resolved:
    """Return the configuration as threads can run it: on the CPU, and with a strategy that works over any transport."""
    config = resolved.config
    if config.world.device == "cuda":
        raise resolved.error("world.device", "simulated ranks run on the CPU; set auto or cpu")
    own: dict[str, Any] = {"world": config.world.model_copy(update={"device": "cpu"})}
    sources = dict(resolved.sources)
    if "strategy.name" not in sources:
        own["strategy"] = config.strategy.model_copy(update={"name": "naive"})
        sources["strategy.name"] = "simulation"
    return replace(resolved, config=config.model_copy(update=own), sources=sources)
