"""What one rank does for benchmarks/all_reduce.py: python benchmarks/cells.py SPECIFICATION (JSON).

A cell is one size on one network. Its sides take turns, round after round, backwards in every second. Each time the
ranks agree on a moment, start there, and do as many all-reduces one after the other as make the time measurable; a
side's time is from the first rank's start to the last rank's end, divided by their number (all ranks are on one machine
and so have one clock).

Every all-reduce is checked. Ranks add whole numbers, so the sum is exact; the second all-reduce of a batch multiplies
it by the number of ranks, which is a power of two, and so exactly too: after the batch the buffer must be equal to the
sum times a power of two, so a mistake in any of them shows. Where bf16 is on the wire, it may be off by that format's
rounding.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ranks import ask, tell
from torch import Tensor

from distloop.collectives import ALL_REDUCE, with_wire
from distloop.transports import Transport
from distloop.transports.join import join
from distloop.world import World

ROW = 2**18  # elements
RESCALE = 8  # all-reduces, after which the values are brought back to where they began
LARGE = 2**20  # bytes from which on a batch is one: the next would find its numbers in the cache
BATCH = 0.01  # seconds that a batch of smaller ones should take at least
LONGEST_BATCH = 1000
FEWEST, MOST = 3, 40  # rounds
BF16 = 2.02 * 2.0**-8  # relative error of a sum of positive numbers: each of them is rounded, and the sum again


@dataclass
class Side:
    """One way of doing it."""

    name: str
    call: Callable[[], None]
    buffer: Tensor | None = None  # what is all-reduced; None: nothing is, and nothing is checked
    tolerance: float = 0.0
    repeats: int = 1
    estimate: float = 0.0  # seconds, of the slowest rank


class Rank:
    """A rank's transport, and what is kept from cell to cell."""

    def __init__(self, transport: Transport):
        self.transport = transport
        self.size = transport.size
        self._buffers: dict[int, Tensor] = {}
        self._auto: Any | None = None
        self.calibration = 0.0  # seconds
        self._barrier = 0.05  # seconds that agreeing on a moment takes

    def forget_network(self) -> None:
        self._auto = None

    def auto(self) -> Any:
        from distloop.collectives.auto import calibrate

        if self._auto is None:
            begin = time.perf_counter()
            self._auto = calibrate(self.transport, refresh=True)
            self.calibration = time.perf_counter() - begin
        return self._auto

    def gather(self, values: Sequence[float]) -> Tensor:
        """Return every rank's values, a row each."""
        return self.transport.all_gather(torch.tensor(values, dtype=torch.float64)).wait()

    def start_together(self) -> None:
        """Return on every rank at the same moment."""
        self.gather([0.0])  # now all are here, and the next one takes as long as it must
        begin = time.perf_counter()
        moment = float(self.gather([begin + 2 * self._barrier]).max())
        self._barrier = 0.5 * self._barrier + 0.5 * (time.perf_counter() - begin)
        time.sleep(max(0.0, moment - time.perf_counter()))

    def bucket(self, numel: int) -> Tensor:
        """Return a tensor where gradients would lie; there is one of each size."""
        if numel not in self._buffers:
            self._buffers[numel] = self.transport.allocate(numel, torch.float32, torch.device("cpu"))
        return self._buffers[numel]


class Cell:
    """The sides of one size, and what they must come to."""

    def __init__(self, rank: Rank, nbytes: int, names: Sequence[str]):
        self.rank, self.numel = rank, nbytes // 4
        self.own = self._contribution(rank.transport.rank)
        self.sum = sum(map(self._contribution, range(rank.size)), torch.zeros_like(self.own))
        self.sides = [self._side(name) for name in names]

    def _contribution(self, rank: int) -> Tensor:
        """Return what a rank adds: a row of whole numbers from 1 to 4093, which bf16 must round; row i adds i to it."""
        return (torch.arange(min(self.numel, ROW)) * 7 + 13 * rank).remainder_(4093).add_(1).float()

    def _side(self, name: str) -> Side:
        transport, numel = self.rank.transport, self.numel
        if name in STREAMS:
            return Side(name, STREAMS[name](numel))
        if name == "library":
            library, private = transport.library, torch.empty(numel)
            assert library is not None, "this transport has no library to compare with"
            return Side(name, lambda: library(private), private)
        bucket, (wire, _, algorithm) = self.rank.bucket(numel), name.rpartition(" ")
        if wire:
            function = with_wire(algorithm, torch.bfloat16)
            return Side(name, lambda: function(transport, bucket), bucket, BF16)
        function = self.rank.auto() if name == "auto" else ALL_REDUCE[name]
        return Side(name, lambda: function(transport, bucket), bucket)

    def batch(self, side: Side) -> tuple[float, float]:
        """Do and check a batch; return when it began and ended here."""
        for i, row in enumerate(self._rows(side)):
            torch.add(self.own, i, out=row)
        if side.buffer is None:
            side.call()  # what it streams is as warm as what was just written is to the others
        down = float(self.rank.size) ** -RESCALE
        self.rank.start_together()
        begin = time.perf_counter()
        for i in range(1, side.repeats + 1):
            side.call()
            if i % RESCALE == 0 and side.buffer is not None:
                side.buffer.mul_(down)
        end = time.perf_counter()
        self._check(side)
        return begin, end

    def _rows(self, side: Side) -> Iterable[Tensor]:
        return [] if side.buffer is None else side.buffer.view(-1, len(self.own))

    def _check(self, side: Side) -> None:
        factor = float(self.rank.size) ** (side.repeats % RESCALE - 1)
        for i, row in enumerate(self._rows(side)):
            expected = (self.sum + i * self.rank.size) * factor
            if torch.equal(row, expected):
                continue
            worst = float(((row - expected).abs() / expected).max())
            if not worst <= side.tolerance * side.repeats:
                where = f"{side.name}, {4 * self.numel} bytes, rank {self.rank.transport.rank}"
                raise SystemExit(f"{where}: the sum is off by {worst:g} of its value")

    def estimate(self, side: Side) -> None:
        """Find how long one all-reduce takes, and choose how many make a batch."""
        for _ in range(2):  # the first may connect
            begin, end = self.batch(side)
            side.estimate = float(self.rank.gather([end - begin]).max())
            if side.estimate > 0.1:
                break
        if 4 * self.numel < LARGE:
            side.repeats = max(1, min(LONGEST_BATCH, round(BATCH / side.estimate)))

    def rounds(self, count: int) -> dict[str, list[float]]:
        """Return the seconds per all-reduce of every side, round by round."""
        marks: dict[str, list[float]] = {side.name: [] for side in self.sides}
        for number in range(count):
            for side in self.sides if number % 2 == 0 else self.sides[::-1]:
                marks[side.name] += self.batch(side)
        times = {}
        for side in self.sides:
            begins, ends = self.rank.gather(marks[side.name]).view(self.rank.size, count, 2).unbind(2)
            times[side.name] = ((ends.amax(0) - begins.amin(0)) / side.repeats).tolist()
        return times


def measure(rank: Rank, cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one cell; every rank returns the same."""
    found = Cell(rank, cell["bytes"], cell["sides"])
    for side in sorted(found.sides, key=lambda side: side.name != "library"):
        found.estimate(side)
        if side.name == "library" and side.estimate > cell.get("at_most", float("inf")):
            return {"left_out": f"the library takes {side.estimate:.1f} s"}
    per_round = sum(side.estimate * side.repeats for side in found.sides) + 3 * rank._barrier * len(found.sides)
    fitting = int(rank.gather([cell["seconds"] / per_round]).min())
    count = max(FEWEST, min(MOST, fitting))
    result: dict[str, Any] = {"times": found.rounds(count)}
    if cell.get("second_look") and is_below(result["times"], cell["second_look"]):
        result = {"first_look": result["times"], "times": found.rounds(max(FEWEST, min(3 * MOST, 3 * fitting)))}
    if rank._auto is not None:
        result |= {"auto": rank._auto.pick(cell["bytes"]), "calibration": rank.calibration}
    return result


def is_below(times: dict[str, list[float]], ours: str) -> bool:
    """Return whether three quarters of the rounds found ``ours`` slower than the library."""
    ratios = [theirs / own for theirs, own in zip(times["library"], times[ours], strict=True)]
    return statistics.quantiles(ratios, n=4)[2] < 1.0


# -- what memory can do ----------------------------------------------------------------------------------------------
# An all-reduce of N buffers of S bytes must read each once and write each once: 2 * N * S bytes. Each stream moves as
# many, with all ranks at once, in memory of their own and without waiting for anyone.


def _copy(numel: int) -> Callable[[], None]:
    source, target = torch.ones(numel), torch.zeros(numel)
    return lambda: void(target.copy_(source))


def _scale(numel: int) -> Callable[[], None]:
    buffer = torch.ones(numel)
    return lambda: void(buffer.mul_(1.0))


def _add(numel: int) -> Callable[[], None]:
    target, source = torch.zeros(2 * numel // 3), torch.ones(2 * numel // 3)
    return lambda: void(target.add_(source))


def void(_: object) -> None:
    """Return nothing."""


STREAMS = {"copy": _copy, "scale": _scale, "add": _add}


def main() -> None:
    torch.set_num_threads(1)
    specification = json.loads(sys.argv[1])
    transport, notes = join(World.from_environment(), specification["transport"], timeout=60.0)
    if notes:
        raise SystemExit(notes[0])  # it would be measured without
    rank, network = Rank(transport), None
    for cell in specification["cells"]:
        if cell.get("network") != network:
            network = cell["network"]
            if transport.rank == 0:
                ask({"do": network})
            rank.gather([0.0])
            rank.forget_network()
        result = measure(rank, cell)
        if transport.rank == 0:
            tell(cell | result)
    transport.close()
    sys.stdout.flush()
    if specification["transport"] != "mpi":  # which ends with the interpreter
        os._exit(0)  # with gloo, torch now and then aborts in the interpreter's end


if __name__ == "__main__":
    main()
