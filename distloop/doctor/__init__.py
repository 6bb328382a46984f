"""Tries what a run will need and says what to do: ``distloop doctor``, alone or as ranks of any launcher.

A check of a host is a function from :class:`Context` to findings, in a registry below; each is bounded in time, and one
that breaks is a finding itself. Then the ranks meet and try things together; every rank goes the same way through that.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial

from distloop.doctor import limits, network, own_ranks, software, storage
from distloop.doctor.findings import Check, Context, Finding, Found, Level, Pending, bounded, failed, in_words, ok
from distloop.doctor.links import Link
from distloop.messages import gather_json
from distloop.transports import Transport

CHECKS = (
    Check("network", "port", network.port),
    Check("host", "cores", limits.cores),
    Check("host", "open files", limits.open_files),
    Check("host", "locked memory", limits.locked_memory),
    Check("host", "processes", limits.processes),
    Check("host", "huge pages", limits.huge_pages),
    Check("network", "host name", network.host_name, 15.0),
    Check("network", "interfaces", network.interfaces, 15.0),
    Check("storage", "shared memory", storage.shared_memory, 70.0),  # may compile the helper
    Check("storage", "run directory", storage.disk, 20.0),
    Check("software", "GPUs", software.gpus, 60.0),
    Check("software", "MPI", software.message_passing, 60.0),
    Check("software", "DeepSpeed", software.deepspeed, 30.0),
)
MEETING = 20.0  # seconds for ranks to find each other: all are there at once
RANKS = "ranks"
AREAS = (*dict.fromkeys(check.area for check in CHECKS), RANKS)
Say = Callable[[Finding], None]
Links = Callable[[list[Link], int], None]


def examine(context: Context, say: Say, *, only: Collection[str] = (), links: Links | None = None) -> list[Finding]:
    """Run all checks, or those of the areas in ``only``; return what was found, on rank 0 that of all hosts.

    Args:
        context: what to examine.
        say: called with each finding on rank 0 as soon as it is there, and on others where they are cut off.
        only: areas.
        links: called with the table of links, by the process whose terminal it is.
    """
    areas = set(only or AREAS)
    found: list[Finding] = []

    def note(findings: list[Finding], *, aloud: bool) -> None:
        found.extend(findings)
        for finding in findings if aloud else []:
            say(finding)

    def look(checks: Iterable[Check]) -> None:
        for check in checks if context.world.local_rank == 0 else ():
            if check.area in areas:
                findings = bounded(partial(check.look, context), check.seconds, check.name)
                note(findings, aloud=context.world.rank == 0)

    look(CHECKS[:1])  # before rank 0 takes the port itself
    meeting = Pending(partial(_meet, context), "rendezvous") if RANKS in areas and context.world.size > 1 else None
    look(CHECKS[1:])  # while ranks meet: they come at the same time, and only one of a host looks at it
    if meeting is not None:
        _together(context, meeting, found, note, say, links)
    elif RANKS in areas:
        note(own_ranks.examine(context), aloud=True)
    return found


def _meet(context: Context) -> tuple[Transport, float]:
    from distloop.doctor import together

    begun = time.monotonic()
    return together.meet(context), time.monotonic() - begun


def _together(
    context: Context,
    meeting: Pending[tuple[Transport, float]],
    found: list[Finding],
    note: Callable[..., None],
    say: Say,
    links: Links | None,
) -> None:
    """Let the ranks meet, tell rank 0 what the other hosts found, and try things together."""
    world = context.world
    try:
        below, seconds = meeting.wait(MEETING)
    except Exception as failure:
        if world.local_rank == 0 and world.rank != 0:  # rank 0 does not hear of this host
            for finding in found:
                if finding.level != Level.OK:
                    say(_at_host(finding))
        note([failed("rendezvous", in_words(failure), _what_to_do(context))], aloud=world.local_rank == 0)
        return
    rows = gather_json(below, [f.as_json() for f in map(_at_host, found)] if world.local_rank == 0 else [])
    if world.rank == 0:
        note([ok("rendezvous", f"{below.size} ranks on {_hosts(below)} met in {seconds:.1f} s")], aloud=True)
        known = {(finding.check, finding.found) for finding in found}
        others = [Finding.from_json(told) for row in rows[1:] for told in row]
        note([f for f in others if f.level != Level.OK and (f.check, f.found) not in known], aloud=True)
    try:
        for finding in _try(context, below, links):
            note([finding], aloud=world.rank == 0)
    except Exception as failure:
        advice = "a rank has ended or hangs: see what it says, and its host"
        note([failed("ranks", in_words(failure), advice)], aloud=world.local_rank == 0)
        below.close(failed=True)
        return
    verdict = gather_json(below, any(f.level == Level.FAILED for f in found))
    if verdict[0] and world.rank != 0:
        note([failed("ranks", "rank 0 tells of what has failed")], aloud=False)
    below.close()


def _try(context: Context, below: Transport, links: Links | None) -> Iterator[Finding]:
    from distloop.doctor import links as measuring
    from distloop.doctor import together

    device = together.device_of(context)
    yield together.same(below, context)
    best: Transport = below
    for name, way in together.ways(below, context).items():
        if isinstance(way, str):
            yield failed(f"sums over {name}", way, "use world.transport torch, or let the hosts reach each other")
            continue
        best = way
        yield from together.sums(below, name, way, device)
    yield together.clocks(below)
    found = measuring.measure(below, best, device)
    if below.rank == 0 and links is not None:
        links(found, below.size)
    yield measuring.verdict(found, below.size)


def _at_host(finding: Finding) -> Finding:
    return replace(finding, host=socket.gethostname())


def _hosts(below: Transport) -> str:
    hosts = len(set(below.hosts)) or 1
    return f"{hosts} host{'s' if hosts > 1 else ''}"


def _what_to_do(context: Context) -> str:
    from distloop.transports.join import meets_by_mpi

    world = context.config.world
    if meets_by_mpi(context.world, world.transport, world.backend):
        return ""  # the failure says it
    return "see the port, the master and the interfaces above; all ranks must be started, with the same MASTER_ADDR"


__all__ = ["AREAS", "CHECKS", "Check", "Context", "Finding", "Found", "Level", "examine"]
