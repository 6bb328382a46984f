"""Who this process is: a pure function of the environment variables of the launcher that started it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

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


# In order of precedence: torchrun may run inside a Slurm job, so the innermost launcher comes first.
LAUNCHERS = (
    Launcher("torchrun", "RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("MPICH", "PMI_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("Slurm", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
)


@dataclass(frozen=True)
class World:
    """A process's place among the ranks of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "none"
    host_known: bool = True  # whether the launcher said which ranks share a host

    @property
    def by_mpirun(self) -> bool:
        """Whether an MPI started these ranks."""
        return self.launcher in ("Open MPI", "MPICH")

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
        for launcher in LAUNCHERS:
            if launcher.marker in env or (launcher.name == "torchrun" and launcher.size in env):
                return cls._from_launcher(launcher, env)
        return cls()

    @classmethod
    def _from_launcher(cls, launcher: Launcher, env: Mapping[str, str]) -> World:
        rank = _number(env, launcher, launcher.rank, least=0)
        size = _number(env, launcher, launcher.size, least=1)
        tasks, task = _slurm_tasks(env), env.get("SLURM_LOCALID", "")
        known = launcher.local_rank in env and (launcher.local_size in env or tasks is not None)
        if known:
            local_rank = _number(env, launcher, launcher.local_rank, least=0)
            local_size = _number(env, launcher, launcher.local_size, least=1, default=tasks)
        elif tasks is not None and task.isdigit():
            local_rank, local_size, known = int(task), tasks, True
        else:
            local_rank, local_size = rank, size  # one host, for all that is said
        if rank >= size:
            raise WorldError(
                f"{launcher.rank}={rank} (set by {launcher.name}) is outside the world: "
                f"{launcher.size}={size} allows ranks 0 to {size - 1}"
            )
        if local_rank >= local_size:
            raise WorldError(
                f"{launcher.local_rank}={local_rank} (set by {launcher.name}) is outside the host: "
                f"{launcher.local_size}={local_size} allows local ranks 0 to {local_size - 1}"
            )
        return cls(rank, size, local_rank, local_size, launcher.name, known)


def _slurm_tasks(env: Mapping[str, str]) -> int | None:
    """Return the number of tasks on this node of a Slurm step: ``SLURM_STEP_TASKS_PER_NODE`` is like ``3(x2),1``."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(times or 1)
    node = env.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def _number(env: Mapping[str, str], launcher: Launcher, name: str, *, least: int, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is not None:
            return default
        raise WorldError(f"environment variable {name} is missing: {launcher.name} sets it for every rank")
    try:
        value = int(text)
    except ValueError:
        raise WorldError(f"environment variable {name}={text!r} is not a whole number") from None
    if value < least:
        raise WorldError(f"environment variable {name}={value} is too small: it must be at least {least}")
    return value
