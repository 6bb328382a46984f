"""Which all-reduce is fastest here, for each size: measured, not guessed."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distloop import native
from distloop.collectives import ALL_REDUCE, NARROW, AllReduce, direct, with_wire
from distloop.messages import gather_json
from distloop.transports import Transport

SIZES = (1 << 10, 16 << 10, 256 << 10, 2 << 20, 8 << 20)  # bytes
BUDGET = 2.3  # seconds that measuring may take
SINGLES = 0.6  # part of what is left of them that trying the following size may take
REPEATS = 9
HOPELESS = 3.0  # times the best: from MEANINGFUL bytes on, such an algorithm is not looked at again
MEANINGFUL = 256 << 10
# Parts of the library's time above which it does it: where latency is what costs; and where bandwidth is, of which less
# can be gained, and which is measured less often.
CLEARLY, CLEARLY_LARGE = 0.9, 0.75
Times = Mapping[str, Mapping[int, Sequence[float]]]  # seconds, by algorithm and size
KEPT = 24 * 3600  # seconds for which a calibration of the same ranks on the same hosts is used again


@dataclass(frozen=True)
class Costs:
    """What each algorithm took, by size, on the slowest rank: ``seconds[name][bytes]``."""

    seconds: Mapping[str, Mapping[int, float]]
    took: float = 0.0  # seconds of measuring; 0 if remembered

    def estimate(self, name: str, size: int) -> float:
        """Return the seconds an algorithm takes for ``size`` bytes: straight lines between what was measured."""
        points = sorted(self.seconds[name].items())
        if size <= points[0][0] or len(points) == 1:
            return points[0][1] * max(1.0, size / points[0][0] if len(points) == 1 else 1.0)
        (s0, t0), (s1, t1) = next(
            (pair for pair in itertools.pairwise(points) if size <= pair[1][0]), (points[-2], points[-1])
        )
        return max(t0 + (t1 - t0) * (size - s0) / (s1 - s0), min(t0, t1))

    def pick(self, size: int, *, in_a_row: bool = False) -> str:
        """Return the name of the fastest algorithm for ``size`` bytes.

        That is the library's if none is clearly faster. Not so ``in_a_row``, one buffer after the other while ranks
        compute: the library waits for its peers again and again in each, and took twice the time there that it takes
        alone, where what is sent without asking did not; then it must be clearly faster itself.
        """
        # One that was given up on is not judged beyond what is known of it.
        known = [name for name, points in self.seconds.items() if size <= max(points) or max(points) == self._largest]
        best = min(known, key=lambda name: self.estimate(name, size))
        if "library" not in known or len(known) == 1:
            return best
        margin = 1 / CLEARLY if in_a_row else CLEARLY if size <= MEANINGFUL else CLEARLY_LARGE
        own = min((name for name in known if name != "library"), key=lambda name: self.estimate(name, size))
        return own if self.estimate(own, size) <= margin * self.estimate("library", size) else "library"

    def best(self, size: int) -> float:
        """Return the seconds that the picked algorithm takes for ``size`` bytes."""
        return self.estimate(self.pick(size), size)

    def size_for(self, waste: float) -> int:
        """Return the bytes that take so long that the time of next to none is the part ``waste`` of it.

        Seconds per byte are those of the largest size: what a link bears for a moment is not what it bears for long.
        """
        return round(self.best(SIZES[0]) / (waste * self.best(self._largest) / self._largest))

    def describe(self) -> str:
        """Return which algorithm does which sizes, in words."""
        parts: list[tuple[str, int]] = []
        for size in (1 << e for e in range(8, 28)):
            name = self.pick(size)
            if parts and parts[-1][0] == name:
                parts[-1] = (name, size)
            else:
                parts.append((name, size))
        told = [f"{name} to {_bytes(size)}" for name, size in parts[:-1]] + [
            parts[-1][0] + (" beyond" if parts[1:] else "")
        ]
        return ", ".join(told)

    def table(self) -> str:
        """Return what was measured as text: a line per algorithm, milliseconds per size; * marks the one to use."""
        sizes = sorted({size for points in self.seconds.values() for size in points})
        lines = [f"{'algorithm':<16}" + "".join(f"{_bytes(size):>12}" for size in sizes)]
        for name, points in self.seconds.items():
            cells = [
                f"{points[size] * 1e3:.3f}{'*' if self.pick(size) == name else ' '}" if size in points else "- "
                for size in sizes
            ]
            lines.append(f"{name:<16}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join(lines)

    @property
    def _largest(self) -> int:
        return max(size for points in self.seconds.values() for size in points)


class Auto:
    """The all-reduce that takes the fastest for each tensor; see :class:`Costs`."""

    def __init__(self, costs: Costs, algorithms: Mapping[str, AllReduce]):
        self.costs, self._algorithms = costs, algorithms

    def __call__(self, transport: Transport, tensor: Tensor) -> None:
        self._algorithms[self.costs.pick(tensor.nbytes)](transport, tensor)

    def choose(self, tensor: Tensor) -> tuple[str, AllReduce]:
        """Return the name of the fastest algorithm for a bucket among others, and the algorithm."""
        name = self.costs.pick(tensor.nbytes, in_a_row=True)
        return name, self._algorithms[name]

    def pick(self, size: int) -> str:
        return self.costs.pick(size)

    def table(self) -> str:
        return self.costs.table()


def calibrate(
    transport: Transport,
    *,
    wire: torch.dtype | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (it never changes)
    refresh: bool = False,
    budget: float = BUDGET,
) -> Auto:
    """Measure the algorithms that suit these ranks; every rank calls it at the same time, and gets the same answer.

    Args:
        transport: to the other ranks.
        wire: dtype on the wire, see :func:`distloop.collectives.direct.all_reduce`.
        device: where the tensors will be.
        refresh: measure again, even if the same ranks have done so on the same hosts within the last day.
        budget: seconds that it may take, as far as can be told beforehand.
    """
    algorithms = candidates(transport, wire, device)
    if len(algorithms) == 1:
        return Auto(Costs({next(iter(algorithms)): {SIZES[0]: 1e-6}}), algorithms)
    path = _path(transport, algorithms, wire)
    found = _remembered(path) if transport.rank == 0 and not refresh else None
    known = gather_json(transport, found)[0]
    if known is not None:
        return Auto(Costs({n: {int(s): t for s, t in p.items()} for n, p in known.items()}), algorithms)
    costs = _measure(transport, algorithms, device, budget)
    if transport.rank == 0:
        _remember(path, costs)
    return Auto(costs, algorithms)


def candidates(transport: Transport, wire: torch.dtype | None, device: torch.device) -> dict[str, AllReduce]:
    """Return the algorithms that these ranks may use, by name."""
    if device.type != "cpu":
        return {"library": ALL_REDUCE["library"]}  # NCCL chooses by itself
    names = ["one_shot", "direct"] if wire is not None else ["library", "one_shot", "direct", "ring", "naive_pipelined"]
    if transport.library is None and "library" in names:
        names.remove("library")
    if transport.shared is not None:
        if len(transport.shared.ranks) == transport.size:
            names.append("shared_memory")
        elif len(set(Counter(transport.hosts).values())) == 1:
            names.append("hierarchical")
    return {n: with_wire(n, wire) if wire is not None and n in NARROW else ALL_REDUCE[n] for n in names}


def _measure(transport: Transport, algorithms: Mapping[str, AllReduce], device: torch.device, budget: float) -> Costs:
    """Time every algorithm once at every size that it is of use for; then again, as often as the budget allows."""
    begun = time.monotonic()
    times: dict[str, dict[int, list[float]]] = {name: {} for name in algorithms}
    tensors = {size: transport.allocate(size // 4, torch.float32, device) for size in SIZES}
    active, spent = list(algorithms), 0.0
    for size, following in itertools.zip_longest(SIZES, SIZES[1:]):
        *once, spent = _slowest(transport, [_timed(transport, algorithms[n], tensors[size]) for n in active], begun)
        for name, t in zip(active, once, strict=True):
            times[name][size] = [t]
        if following is not None:
            active = _worth_trying(times, active, size, following, (budget - spent) * SINGLES)
        if not active:
            break
    for _ in range(REPEATS):
        again = _worth_repeating(times, budget - spent)
        if not again:
            break
        *more, spent = _slowest(transport, [_timed(transport, algorithms[n], tensors[s]) for n, s in again], begun)
        for (name, size), t in zip(again, more, strict=True):
            times[name][size].append(t)
    found = {name: {size: _typical(ts) for size, ts in points.items()} for name, points in times.items()}
    return Costs(found, time.monotonic() - begun)


def _worth_trying(times: Times, active: Sequence[str], size: int, following: int, seconds: float) -> list[str]:
    """Return the algorithms to try at the following size: not the hopeless ones, and as many as there is time for.

    The library's comes first: without it nobody could say whether another is faster.
    """
    now = {name: times[name][size][0] for name in active}
    hopeless = math.inf if size < MEANINGFUL else HOPELESS * min(now.values())
    left = seconds
    chosen: list[str] = []
    for name in sorted(now, key=lambda name: (name != "library", now[name])):
        expected = _expected(times[name], size, following)
        if now[name] <= hopeless and (expected <= left or (not chosen and expected <= 2 * left)):
            left -= expected
            chosen.append(name)
    return [name for name in active if name in chosen]


def _expected(points: Mapping[int, Sequence[float]], size: int, following: int) -> float:
    """Return the seconds that an algorithm may take at the following size, going on as from the size before."""
    before = max((s for s in points if s < size), default=None)
    if before is None:
        return 2 * points[size][0]
    slope = (points[size][0] - points[before][0]) / (size - before)
    return 1.5 * points[size][0] + max(slope, 0.0) * (following - size)


def _worth_repeating(times: Times, seconds: float) -> list[tuple[str, int]]:
    """Return algorithms and sizes that are near the best, the quickest first, as many as there is time for."""
    cells = [(n, size) for n, points in times.items() for size in points]
    best = {size: min(min(p[size]) for p in times.values() if size in p) for _, size in cells}
    near = sorted((_typical(times[n][s]), s, n) for n, s in cells if min(times[n][s]) <= HOPELESS * best[s])
    left = seconds
    chosen: list[tuple[str, int]] = []
    for t, size, name in near:
        left -= 1.5 * t
        if left > 0:
            chosen.append((name, size))
    return chosen


def _typical(times: Sequence[float]) -> float:
    """Return the lower median: the first of few times is of a cold connection."""
    return sorted(times)[(len(times) - 1) // 2]


def _timed(transport: Transport, all_reduce: AllReduce, tensor: Tensor) -> float:
    direct.one_shot(transport, torch.zeros(1))  # begin together
    begun = time.perf_counter()
    all_reduce(transport, tensor)
    return time.perf_counter() - begun


def _slowest(transport: Transport, own: Sequence[float], begun: float) -> list[float]:
    """Return the slowest rank's times, and behind them the seconds since ``begun``: the same list on every rank."""
    mine = torch.tensor([*own, time.monotonic() - begun], dtype=torch.float64)
    return [float(t) for t in transport.all_gather(mine).wait().amax(0)]


def _path(transport: Transport, algorithms: Mapping[str, AllReduce], wire: torch.dtype | None) -> Path:
    from distloop.transports.hosts import host

    hosts = gather_json(transport, host())
    what = [hosts, type(transport).__name__, sorted(algorithms), str(wire), torch.__version__, torch.get_num_threads()]
    return native.cache() / f"calibration-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"


def _remembered(path: Path) -> Any:
    """Return the times that a file holds; None if there is none, or if it is old or broken."""
    try:
        if time.time() - path.stat().st_mtime > KEPT:
            return None
        found = json.loads(path.read_text())
        fit = all(
            name in ALL_REDUCE and points and all(int(s) > 0 and 0 < t < math.inf for s, t in points.items())
            for name, points in found.items()
        )
        return found if fit and found else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _remember(path: Path, costs: Costs) -> None:
    try:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(costs.seconds))
        part.rename(path)
    except OSError:
        pass  # it will be measured again


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB" if size >= 1 << 10 else f"{size} B"
