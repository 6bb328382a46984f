"""The sections of benchmarks/all_reduce.py: what each measures, and the rows of figures that it comes to."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ranks
from emulated import Hosts, bits_per_second

KIB, MIB = 1024, 1024**2
HEADERS = 1.046  # bytes on an Ethernet per byte of a long TCP stream
CELLS = str(Path(__file__).parent / "cells.py")
Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A figure with its quartiles: how many times faster ours is than theirs, or what share of a bound it reaches."""

    what: str
    ours: str
    theirs: str
    ours_ms: float
    theirs_ms: float
    figure: float
    low: float
    high: float
    must: float | None = None
    moonshot: float | None = None
    share: bool = False

    @property
    def missed(self) -> bool:
        return self.must is not None and self.figure < self.must

    def written(self, value: float | None) -> str:
        if value is None:
            return "-"
        return f"{100 * value:.1f} %" if self.share else f"{value:.2f}x"

    def line(self) -> list[str]:
        """Return the row's line in a table."""
        reached = "-"
        if self.must is not None:
            reached = "**missed**" if self.missed else "yes"
        if self.moonshot is not None and self.figure >= self.moonshot:
            reached = "moonshot"
        figure = f"**{self.written(self.figure)}** ({self.written(self.low)} to {self.written(self.high)})"
        sides = [self.ours, f"{self.ours_ms:.4g}", self.theirs, f"{self.theirs_ms:.4g}"]
        return [self.what, *sides, figure, self.written(self.must), self.written(self.moonshot), reached]


HEAD = ["what", "ours", "ms", "against", "ms", "figure (quartiles)", "must", "moonshot", "reached"]


def compare(
    what: str,
    times: dict[str, list[float]],
    ours: str,
    theirs: str | float,
    must: float | None = None,
    moonshot: float | None = None,
    *,
    named: str = "",
    share: bool = False,
) -> Row:
    """Compare neighbouring times; ``theirs`` may be a bound in seconds."""
    other = times[theirs] if isinstance(theirs, str) else [theirs] * len(times[ours])
    ratios = [b / a for a, b in zip(times[ours], other, strict=True)]
    low, figure, high = statistics.quantiles(ratios, n=4)
    return Row(
        what,
        ours,
        named or str(theirs),
        1e3 * statistics.median(times[ours]),
        1e3 * statistics.median(other),
        figure,
        low,
        high,
        must,
        moonshot,
        share,
    )


def size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def speed(rate: str) -> str:
    """Return a rate as people write it."""
    return rate.replace("mbit", " Mbit/s").replace("gbit", " Gbit/s")


def group(
    count: int,
    transport: str,
    cells: list[dict[str, Any]],
    *,
    hosts: int = 0,
    rate: str | None = None,
    delay_ms: float = 0.0,
    quick: bool = False,
    mpi: bool = False,
) -> Results:
    """Measure cells on one group of ranks; a cell may change the network of its hosts."""
    cells = [cell | ({"seconds": 0.2} if quick else {}) for cell in cells]
    program = [CELLS, json.dumps({"transport": transport, "cells": cells})]
    with Hosts(hosts, rate=rate, delay_ms=delay_ms) if hosts else nullcontext() as network:

        def shape(wanted: dict[str, Any]) -> None:
            assert network is not None
            network.shape(**wanted)

        limit = 120 + 10 * sum(cell["seconds"] for cell in cells)
        found = ranks.run(program, count, hosts=network, mpi=mpi, limit=limit, answer=shape)
    where = {"ranks": count, "hosts": hosts, "rate": rate, "delay_ms": delay_ms}
    return [cell | where | (cell.get("network") or {}) for cell in found]


# -- one host --------------------------------------------------------------------------------------------------------


def small(quick: bool) -> Results:
    """One host, small messages: shared memory against gloo."""
    return [
        cell
        for count in (2, 4)
        for cell in group(
            count,
            "shared_memory",
            [{"bytes": k * KIB, "sides": ["shared_memory", "library"], "seconds": 2.0} for k in (1, 4, 16, 64)],
            quick=quick,
        )
    ]


def small_rows(results: Results) -> Iterator[Row]:
    musts = {2: (6.0, 50.0), 4: (20.0, 100.0)}
    for cell in results:
        what = f"{cell['ranks']} ranks, {size(cell['bytes'])}"
        yield compare(what, cell["times"], "shared_memory", "library", *musts[cell["ranks"]], named="gloo")


def large(quick: bool) -> Results:
    """One host, large buckets in place: shared memory against gloo and against what memory can do."""
    sides = ["shared_memory", "library", "copy", "scale", "add"]
    cells = [{"bytes": m * MIB, "sides": sides, "seconds": 6.0} for m in (16, 64)]
    return [cell for count in (2, 4) for cell in group(count, "shared_memory", cells, quick=quick)]


def large_rows(results: Results) -> Iterator[Row]:
    for cell in results:
        times, what = cell["times"], f"{cell['ranks']} ranks, {size(cell['bytes'])}"
        yield compare(what, times, "shared_memory", "library", 3.0, 6.0, named="gloo")
        best = min(("copy", "scale", "add"), key=lambda stream: statistics.median(times[stream]))
        named = f"memory bound ({best})"
        yield compare(what, times, "shared_memory", best, None, 0.8, named=named, share=True)


def mpi(quick: bool) -> Results:
    """One host, under mpirun: every algorithm on the mpi transport against MPI's own Allreduce."""
    sides = ["shared_memory", "naive", "ring", "direct", "library"]
    cells = [{"bytes": k * KIB, "sides": sides, "seconds": 1.5} for k in (1, 4, 16, 64, 1024, 16 * 1024)]
    return [cell for count in (2, 4) for cell in group(count, "mpi", cells, mpi=True, quick=quick)]


def mpi_rows(results: Results) -> Iterator[Row]:
    for cell in results:
        for side in cell["sides"][:-1]:
            moonshot = 0.5 if side == "shared_memory" and cell["bytes"] <= 64 * KIB else None
            what = f"{cell['ranks']} ranks, {size(cell['bytes'])}"
            yield compare(what, cell["times"], side, "library", None, moonshot, named="MPI Allreduce")


# -- several hosts ---------------------------------------------------------------------------------------------------

LATENCY_SIDES = ["auto", "one_shot", "direct", "tree", "ring", "naive"]


def latency(quick: bool) -> Results:
    """Hosts 5 ms apart, one rank each: the best of ours over sockets against gloo."""
    cells = [{"bytes": k * KIB, "sides": [*LATENCY_SIDES, "library"], "seconds": 6.0} for k in (4, 256)]
    return [c for count in (4, 8) for c in group(count, "sockets", cells, hosts=count, delay_ms=5.0, quick=quick)]


def latency_rows(results: Results) -> Iterator[Row]:
    musts = {(4, 4): (4.0, 6.0), (4, 8): (8.0, 13.0), (256, 4): (2.5, 4.0), (256, 8): (4.0, 7.0)}
    for cell in results:
        what = f"{cell['ranks']} hosts, {size(cell['bytes'])}"
        best = min(LATENCY_SIDES, key=lambda side: statistics.median(cell["times"][side]))
        must = musts[cell["bytes"] // KIB, cell["ranks"]]
        for side in LATENCY_SIDES:
            named = f"{what}, auto ({cell['auto']})" if side == "auto" else what
            yield compare(named, cell["times"], side, "library", *(must if side == best else ()), named="gloo")


def wire_bound(cell: dict[str, Any]) -> float:
    """Return the seconds that no all-reduce of fp32 can beat: what each link must carry at least."""
    share = 2 * (cell["hosts"] - 1) / cell["hosts"]
    return HEADERS * share * 8 * cell["bytes"] / bits_per_second(cell["rate"])


def bandwidth(quick: bool) -> Results:
    """16 MiB over links of 500 Mbit/s: the ring against the wire, and the pipelined naive against the textbook's."""
    sides = [["ring", "direct", "library"], ["naive_pipelined", "naive"]]
    cells = [{"bytes": 16 * MIB, "sides": two, "seconds": 10.0} for two in sides]
    return group(4, "sockets", cells, hosts=4, rate="500mbit", quick=quick)


def bandwidth_rows(results: Results) -> Iterator[Row]:
    for cell in results:
        times, what = cell["times"], f"{cell['hosts']} hosts, {speed(cell['rate'])}, {size(cell['bytes'])}"
        bound = wire_bound(cell)
        if "naive" in times:
            yield compare(what, times, "naive_pipelined", "naive", 1.5)
            continue
        yield compare(what, times, "ring", bound, 0.97, 0.99, named="wire bound", share=True)
        yield compare(what, times, "direct", bound, named="wire bound", share=True)
        yield compare(what, times, "library", bound, named="wire bound", share=True)


def hierarchical(quick: bool) -> Results:
    """2 hosts of 4 ranks, links of 1 Gbit/s: first within the host, against gloo, which knows nothing of hosts."""
    cells = [{"bytes": m * MIB, "sides": ["hierarchical", "library"], "seconds": 8.0} for m in (1, 16)]
    return group(8, "sockets", cells, hosts=2, rate="1gbit", quick=quick)


def hierarchical_rows(results: Results) -> Iterator[Row]:
    musts = {1: (2.0, 2.3), 16: (1.6, 1.72)}
    for cell in results:
        what = f"2 hosts x 4 ranks, {speed(cell['rate'])}, {size(cell['bytes'])}"
        yield compare(what, cell["times"], "hierarchical", "library", *musts[cell["bytes"] // MIB], named="gloo")


def bf16(quick: bool) -> Results:
    """16 MiB over links of 500 Mbit/s: bf16 on the wire against fp32."""
    cells = [{"bytes": 16 * MIB, "sides": ["bf16 direct", "library"], "seconds": 6.0}]
    return group(4, "sockets", cells, hosts=4, rate="500mbit", quick=quick)


def bf16_rows(results: Results) -> Iterator[Row]:
    for cell in results:
        what = f"{cell['hosts']} hosts, {speed(cell['rate'])}, {size(cell['bytes'])}"
        yield compare(what, cell["times"], "bf16 direct", "library", 1.85, 1.95, named="gloo, fp32")


# -- the choice ------------------------------------------------------------------------------------------------------

SIZES = [KIB, 16 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB]
DELAYS = [0.0, 1.0, 5.0]
RATES = ["100mbit", "500mbit", "1gbit"]


def auto(quick: bool) -> Results:
    """Sizes times ranks times networks: the choice calibrated there against gloo. A cell below 1 has a second look."""
    sizes = SIZES[::3] if quick else SIZES
    plain: dict[str, Any] = {"sides": ["auto", "library"], "seconds": 0.7, "second_look": "auto", "at_most": 1.0}
    found = []
    for count in (2, 4, 8):
        found += group(count, "shared_memory", [plain | {"bytes": b} for b in sizes], quick=quick)
        delays = [plain | {"bytes": b, "network": {"delay_ms": d}} for d in DELAYS for b in sizes]
        found += group(count, "sockets", delays, hosts=count, delay_ms=DELAYS[-1], quick=quick)
        # All links together carry 2 Gbit/s at most: a machine of two cores must keep up with them.
        kept = [rate for rate in RATES if count * bits_per_second(rate) <= 2.1e9]
        rates = [plain | {"bytes": b, "network": {"rate": r}} for r in kept for b in sizes]
        found += group(count, "sockets", rates, hosts=count, rate=kept[0], quick=quick)
    return found


def auto_network(cell: dict[str, Any]) -> str:
    if not cell["hosts"]:
        return "one host"
    return f"hosts, {speed(cell['rate'])}" if cell["rate"] else f"hosts, {cell['delay_ms']:g} ms"


def auto_rows(results: Results) -> Iterator[Row]:
    measured = [cell for cell in results if "times" in cell]
    kept = [
        compare(
            f"{auto_network(cell)}, {cell['ranks']} ranks, {size(cell['bytes'])}, {cell['auto']}",
            cell["times"],
            "auto",
            "library",
            named="gloo",
        )
        for cell in measured
    ]
    yield from kept
    mean = math.exp(statistics.fmean(math.log(row.figure) for row in kept))
    ours, theirs = (
        math.exp(statistics.fmean(math.log(getattr(row, key)) for row in kept)) for key in ("ours_ms", "theirs_ms")
    )
    low, high = min(row.figure for row in kept), max(row.figure for row in kept)
    yield Row("geometric mean (lowest, highest)", "auto", "gloo", ours, theirs, mean, low, high, 1.5, 3.0)
    # Where auto leaves it to gloo both sides are the same call: what is seen there is noise.
    same = [row for row, cell in zip(kept, measured, strict=True) if cell["auto"] == "library"]
    least = min([1.0, *(row.high for row in same)])
    if same:
        middle = statistics.median(row.figure for row in same)
        extremes = min(row.figure for row in same), max(row.figure for row in same)
        yield Row("gloo against itself (lowest, highest)", "library", "gloo", ours, theirs, middle, *extremes)
    # Below 1 beyond noise: three quarters of the rounds were slower than there, in the second look too.
    below = [row for row in kept if row.high < least]
    share = 1 - len(below) / len(kept)
    yield Row("cells not below 1 beyond noise", "auto", "gloo", ours, theirs, share, share, share, 1.0, None, True)


SECTIONS: dict[str, tuple[Callable[[bool], Results], Callable[[Results], Iterator[Row]]]] = {
    "small": (small, small_rows),
    "large": (large, large_rows),
    "mpi": (mpi, mpi_rows),
    "latency": (latency, latency_rows),
    "bandwidth": (bandwidth, bandwidth_rows),
    "hierarchical": (hierarchical, hierarchical_rows),
    "bf16": (bf16, bf16_rows),
    "auto": (auto, auto_rows),
}
