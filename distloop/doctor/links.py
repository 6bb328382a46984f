"""Latency and bandwidth between every two ranks, one pair at a time."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from distloop.doctor.findings import Finding, ok, warning
from distloop.report.machine import in_words
from distloop.transports import Transport

BUDGET = 15.0  # seconds for all pairs
MOST = 120  # pairs
SMALL, LARGE = 1 << 18, 1 << 22  # bytes; the large message only where the small one is quick
QUICK = 0.05  # seconds
PINGS, TIMES = 20, 3
SLOW = 3.0  # times slower than the median of its kind: worth a look


@dataclass(frozen=True)
class Link:
    """What was measured between two ranks."""

    one: int
    other: int
    latency: float  # seconds one way
    bandwidth: float  # bytes per second
    across: bool = False  # between hosts

    def in_words(self) -> str:
        return f"{1e6 * self.latency:.0f} us, {in_words(self.bandwidth)}/s"


def measure(below: Transport, way: Transport, device: torch.device) -> list[Link]:
    """Measure over ``way``; all ranks return the same. What is beyond the budget is left out."""
    begun, links = time.monotonic(), []
    for one, other in pairs(below.size):
        found = (0.0, 0.0)
        if below.rank in (one, other):
            found = _ping(way, one, other, device)
        # Rank ``one``'s figures and rank 0's clock.
        row = torch.tensor([*found, time.monotonic() - begun], dtype=torch.float64)
        rows = below.all_gather(row).wait().tolist()
        across = bool(below.hosts) and below.hosts[one] != below.hosts[other]
        links.append(Link(one, other, rows[one][0], rows[one][1], across))
        if rows[0][2] > BUDGET:
            break
    return links


def pairs(size: int) -> list[tuple[int, int]]:
    """Return which ranks to measure between, neighbours first; in large worlds not all."""
    every = sorted(itertools.combinations(range(size), 2), key=lambda pair: (pair[1] - pair[0], pair))
    return every[: max(MOST, 0)]


def verdict(links: list[Link], size: int) -> Finding:
    """Say which pair is slowest, and whether that is worth a look."""
    slowest = min(links, key=lambda link: link.bandwidth)
    kind = [link.bandwidth for link in links if link.across == slowest.across]
    left = size * (size - 1) // 2 - len(links)
    told = f"slowest pair: ranks {slowest.one} and {slowest.other}, {slowest.in_words()}"
    told += f" ({left} pairs not measured)" if left else ""
    if len(kind) > 2 and statistics.median(kind) > SLOW * slowest.bandwidth:
        advice = f"the median is {in_words(statistics.median(kind))}/s: look at the cable, or at what else runs there"
        return warning("links", told, advice)
    return ok("links", told)


def _ping(way: Transport, one: int, other: int, device: torch.device) -> tuple[float, float]:
    """Return latency and bandwidth on rank ``one``, which decides; rank ``other`` sends back what it gets."""
    leads, peer = way.rank == one, other if way.rank == one else one
    token = torch.zeros(2, device=device)
    times = [_there_and_back(way, peer, token, leads=leads) for _ in range(PINGS)]
    latency, bandwidth = statistics.median(times) / 2, 0.0
    for size in (SMALL, LARGE):
        message = torch.zeros(size // 4, device=device)
        times = [_there_and_back(way, peer, message, leads=leads) for _ in range(TIMES)]
        bandwidth = 2 * size / min(times)
        token[0] = float(min(times) < QUICK)
        _there_and_back(way, peer, token, leads=leads)  # tells the other whether to go on
        if not token[0]:
            break
    return latency, bandwidth


def _there_and_back(way: Transport, peer: int, message: Tensor, *, leads: bool) -> float:
    begun = time.perf_counter()
    if leads:
        way.send(message, peer)
        way.recv(message, peer)
    else:
        way.recv(message, peer)
        way.send(message, peer)
    if message.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun
