"""Who this process is: a pure function of the environment variables of the launcher that started it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from distloop.errors import WorldError


@dataclass(frozen=True)
class Launcher:
    """The names under which one launcher announces a rank's place; ``marker`` tells that it was this launcher."""

    name: str
    marker: str
    rank: str
    size: str
    local_rank: str
    local_size: str  # "" where the launcher has no such variable


def _of_mpi(name: str, prefix: str) -> Launcher:
    return Launcher(
        name, f"{prefix}_RANK", f"{prefix}_RANK", f"{prefix}_SIZE", f"{prefix}_LOCAL_RANK", f"{prefix}_LOCAL_SIZE"
    )


# In order of precedence: torchrun may run inside a Slurm job, so the innermost launcher comes first. Intel MPI and
# MVAPICH start by MPICH's process manager and set its variables too: what only they set is asked for before.
LAUNCHERS = (
    Launcher("torchrun", "RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _of_mpi("Open MPI", "OMPI_COMM_WORLD"),
    _of_mpi("MVAPICH", "MV2_COMM_WORLD"),
    Launcher("Intel MPI", "I_MPI_HYDRA_UUID", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("MPICH", "PMI_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    Launcher("Slurm", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
)
MPIS = ("Open MPI", "MVAPICH", "Intel MPI", "MPICH")
TASKS = "SLURM_STEP_TASKS_PER_NODE"
LONGEST = 9  # digits


@dataclass(frozen=True)
class World:
    """A process's place among the ranks of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "none"
    host_known: bool = True  # whether the launcher said which ranks share a host
    because: str = field(default="no launcher's variables are set", compare=False)  # why it is taken for this launcher

    @property
    def by_mpirun(self) -> bool:
        """Whether an MPI started these ranks."""
        return self.launcher in MPIS

    @property
    def single_host(self) -> bool:
        """Whether every rank is known to run on this host."""
        return self.host_known and self.local_size == self.size

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> World:
        """Read the world from ``environment`` (default: ``os.environ``); no launcher means one rank.

        Raises:
            WorldError: a variable is missing, is not a number, or contradicts another.
        """
        env = os.environ if environment is None else environment
        # One that says how many ranks there are, and not which this is, would have each of them train alone.
        there = [one for one in LAUNCHERS if one.marker in env or (one.marker == one.rank and one.size in env)]
        if there:
            others = ", ".join(dict.fromkeys(one.name for one in there if one.name != there[0].name))
            because = f"{there[0].marker} is set" + (f", within {others}" if others else "")
            return replace(cls._from_launcher(there[0], env), because=because)
        if "PMIX_RANK" in env:
            raise WorldError(
                f"PMIx started this process as rank {_shown(env['PMIX_RANK'])[1:-1]} (PMIX_RANK), and says to MPI "
                "programs alone of how many: start with mpirun or srun, or set RANK and WORLD_SIZE"
            )
        return cls()

    @classmethod
    def _from_launcher(cls, launcher: Launcher, env: Mapping[str, str]) -> World:
        rank = _number(env, launcher, launcher.rank, least=0)
        size = _number(env, launcher, launcher.size, least=1)
        _refuse_outside(launcher, (launcher.rank, rank), (launcher.size, size), "world")
        local, among = launcher.local_rank, launcher.local_size
        local_rank, local_size = (_number(env, launcher, n, least=0) if n in env else None for n in (local, among))
        if local_size is None and (tasks := _slurm_tasks(env, launcher)) is not None:
            local_size, among = tasks, TASKS
            if local_rank is None and "SLURM_LOCALID" in env:
                local_rank, local = _number(env, launcher, "SLURM_LOCALID", least=0), "SLURM_LOCALID"
        if local_size is not None and not 1 <= local_size <= size:
            raise WorldError(
                f"{among}={local_size} (set by {launcher.name}) cannot be: a host has at least 1 rank, and at most all "
                f"of the world, {launcher.size}={size}"
            )
        if local_size is None and local_rank is not None:
            _refuse_outside(launcher, (local, local_rank), (launcher.size, size), "host")
        if local_rank is None or local_size is None:
            # One host, for all that is said; a number there that is given is kept: it chooses the GPU.
            return cls(rank, size, rank if local_rank is None else local_rank, size, launcher.name, False)
        _refuse_outside(launcher, (local, local_rank), (among, local_size), "host")
        return cls(rank, size, local_rank, local_size, launcher.name, True)


def _refuse_outside(launcher: Launcher, rank: tuple[str, int], size: tuple[str, int], what: str) -> None:
    if rank[1] >= size[1]:
        allowed = f"{'local ' if what == 'host' else ''}ranks 0 to {size[1] - 1}"
        raise WorldError(
            f"{rank[0]}={rank[1]} (set by {launcher.name}) is outside the {what}: {size[0]}={size[1]} allows {allowed}"
        )


def _slurm_tasks(env: Mapping[str, str], launcher: Launcher) -> int | None:
    """Return the number of tasks on this node of a Slurm step, whose ``TASKS`` are like ``3(x2),1``, if it is one."""
    if TASKS not in env or "SLURM_NODEID" not in env:
        return None
    node, first = _number(env, launcher, "SLURM_NODEID", least=0), 0
    parts = [re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part) for part in env[TASKS].split(",")]
    for part in parts:
        if part is None or None in parts:
            raise WorldError(f"environment variable {TASKS}={_shown(env[TASKS])} is not like 3(x2),1")
        first += int(part[2] or 1)
        if node < first:
            return int(part[1])
    raise WorldError(f"SLURM_NODEID={node} is outside the {first} nodes of {TASKS}={_shown(env[TASKS])}")


def _number(env: Mapping[str, str], launcher: Launcher, name: str, *, least: int) -> int:
    text = env.get(name)
    if text is None:
        raise WorldError(f"environment variable {name} is missing: {launcher.name} sets it for every rank")
    if re.fullmatch(r"-?[0-9]+", text, re.ASCII) is None:
        raise WorldError(f"environment variable {name}={_shown(text)} is not a whole number")
    if text.startswith("-") or len(text.lstrip("0")) > LONGEST:
        what = "small: it must be at least {least}" if text.startswith("-") else "large"
        raise WorldError(f"environment variable {name}={_shown(text)[1:-1]} is too {what.format(least=least)}")
    if (value := int(text.lstrip("0") or "0")) < least:
        raise WorldError(f"environment variable {name}={value} is too small: it must be at least {least}")
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
