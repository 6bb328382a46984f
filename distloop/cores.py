"""Which cores a process has, what part of them is a rank's where ranks share them, and which it may be bound to."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from distloop.control_groups import Group, groups_of
from distloop.errors import WorldError
from distloop.world import World

PROC, SYS = Path("/proc"), Path("/sys")
PER_TASK = "SLURM_CPUS_PER_TASK"


@dataclass(frozen=True)
class Cores:
    """What a process may compute on.

    Attributes:
        cores: the processors (hyper-threads) of each core that it may run on.
        nodes: by core, the number of the memory node (NUMA) that it is of.
        quota: processors whose time its control group may take; None without a limit.
        group: which control group that is.
        task: cores that Slurm gives this rank.
    """

    cores: tuple[tuple[int, ...], ...]
    nodes: tuple[int, ...]
    quota: float | None = None
    group: str = ""
    task: int | None = None

    @classmethod
    def of_this_process(
        cls, world: World, environment: Mapping[str, str] | None = None, proc: Path = PROC, system: Path = SYS
    ) -> Cores:
        """Look: at the affinity, at the control groups' limits, and at Slurm's where Slurm started this rank."""
        env = os.environ if environment is None else environment
        cores, nodes = _of_affinity(affinity(), system)
        quota, group = cpu_quota(proc / "self" / "cgroup", system / "fs" / "cgroup")
        task = env.get(PER_TASK, "") if world.launcher == "Slurm" else ""
        return cls(cores, nodes, quota, group, max(1, int(task)) if task.isascii() and task.isdecimal() else None)

    @property
    def count(self) -> int:
        """How many cores a process alone has: at least 1."""
        return shares([self])[0]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Cores:
        cores = tuple(tuple(core) for core in told["cores"])
        return cls(cores, tuple(told["nodes"]), told["quota"], told["group"], told["task"])


def shares(of_ranks: Sequence[Cores]) -> list[int]:
    """Return how many cores each rank of one host has, given what each of them may use; at least 1.

    A core counts in full for who has it alone, and in equal parts for those who share it; so does a quota.
    """
    takers = Counter(core[0] for own in of_ranks for core in own.cores)
    payers = Counter(own.group for own in of_ranks)
    found = []
    for own in of_ranks:
        part = sum((Fraction(1, takers[core[0]]) for core in own.cores), Fraction())
        if own.quota is not None:
            part = min(part, Fraction(own.quota) / payers[own.group])
        if own.task is not None:
            part = min(part, Fraction(own.task))
        found.append(max(1, math.floor(part)))
    return found


def bindings(of_ranks: Sequence[Cores], near: Sequence[int | None], *, least: int = 1) -> list[tuple[int, ...]] | str:
    """Return the processors to bind each rank of a host to, or one clause that says why it is left.

    Ranks that may use the same cores get even parts of them, hyper-threads of a core together and cores of a memory
    node beside each other; and where each has a node to be near, its GPU's, cores of that. Each rank is to get
    ``least`` cores.
    """
    sets = [own.cores for own in of_ranks]
    if len(of_ranks) < 2:
        return "one rank has them all"
    if len(set(sets)) > 1:
        return "their launcher has bound them"
    if len(sets[0]) < least * len(sets):
        return f"there {'is 1 core' if len(sets[0]) == 1 else f'are {len(sets[0])} cores'} for {len(sets)} ranks"
    if (quota := of_ranks[0].quota) is not None and quota < len(sets[0]):
        return f"a control group limits them to the time of {quota:g} processors"
    by_node = sorted(zip(of_ranks[0].nodes, sets[0], strict=True))
    at = Counter(node for node, _ in by_node)
    if None not in near and all(at[node] >= least * near.count(node) for node in set(near) if node is not None):
        parts: dict[int, tuple[int, ...]] = {}
        for node in set(near):
            ranks = [rank for rank, wanted in enumerate(near) if wanted == node]
            parts |= zip(ranks, _even([core for n, core in by_node if n == node], len(ranks)), strict=True)
        return [parts[rank] for rank in range(len(of_ranks))]
    return _even([core for _, core in by_node], len(of_ranks))


def bind(processors: Iterable[int], proc: Path = PROC) -> None:
    """Keep this process, with all threads it has and will have, on these processors."""
    if not hasattr(os, "sched_setaffinity"):
        raise WorldError("world.bind: this system does not let processes choose their cores: set none")
    wanted = set(processors)
    for thread in (proc / "self" / "task").iterdir():
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread.name), wanted)


def affinity() -> set[int]:
    """Return the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def chosen_threads(world: World, environment: Mapping[str, str] | None = None, proc: Path = PROC) -> int | None:
    """Return the threads that the user has set in OMP_NUM_THREADS; None if there are none.

    torchrun sets it to 1 where the user has not. The environment that torchrun itself was started with tells who it
    was; where that cannot be read, or somebody stands in between, it counts as the user.
    """
    env = os.environ if environment is None else environment
    # A list has a number for each level of nesting; what is no number counts for OpenMP no more than for us.
    given = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    chosen = int(given) if re.fullmatch("[0-9]{1,6}", given) and int(given) else None
    if chosen != 1 or world.launcher != "torchrun" or "TORCHELASTIC_RUN_ID" not in env:
        return chosen
    try:
        variables = (proc / str(os.getppid()) / "environ").read_bytes().split(b"\0")
    except OSError:
        return chosen
    names = {variable.partition(b"=")[0] for variable in variables}
    by_user = b"OMP_NUM_THREADS" in names or b"TORCHELASTIC_RUN_ID" in names or names == {b""}
    return chosen if by_user else None


def cpu_quota(groups: Path, mounted: Path) -> tuple[float | None, str]:
    """Return the processors whose time this process's control groups allow it, and which of them; None if all."""
    least: tuple[float | None, str] = (None, "")
    for group in groups_of("cpu", groups, mounted):
        quota = _quota(group)
        if quota is not None and (least[0] is None or quota < least[0]):
            least = quota, str(group.folder)
    return least


def listed(text: str) -> set[int]:
    """Return the numbers in a list as the kernel writes it: 0-3,8."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found |= set(range(int(first), int(last or first) + 1))
    return found


def node_of_device(bus: str, system: Path = SYS) -> int | None:
    """Return the memory node that a PCI device is at; None if it is not known, or there is one alone."""
    try:
        node = int((system / "bus" / "pci" / "devices" / bus.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _of_affinity(processors: set[int], system: Path) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Return the processors by core, and the memory node of each core."""
    at: dict[int, int] = {}
    for folder in (system / "devices" / "system" / "node").glob("node[0-9]*"):
        with suppress(OSError, ValueError):
            at |= dict.fromkeys(listed((folder / "cpulist").read_text()), int(folder.name[4:]))
    cores = set()
    for processor in processors:
        siblings = {processor}
        with suppress(OSError, ValueError):
            file = system / "devices" / "system" / "cpu" / f"cpu{processor}" / "topology" / "thread_siblings_list"
            siblings |= listed(file.read_text()) & processors
        cores.add(tuple(sorted(siblings)))
    ordered = tuple(sorted(cores))
    return ordered, tuple(at.get(core[0], 0) for core in ordered)


def _even(cores: Sequence[tuple[int, ...]], parts: int) -> list[tuple[int, ...]]:
    each = len(cores) // parts  # alike for all: who has more would wait for the others
    return [tuple(sorted(p for core in cores[i * each : (i + 1) * each] for p in core)) for i in range(parts)]


def _quota(group: Group) -> float | None:
    try:
        if group.first_version:
            quota = (group.folder / "cpu.cfs_quota_us").read_text().strip()
            period = (group.folder / "cpu.cfs_period_us").read_text().strip()
        else:
            quota, period = (group.folder / "cpu.max").read_text().split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max"
        return None
