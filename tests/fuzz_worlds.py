# ruff: noqa: RUF001 - letters that look like others are what is meant
"""Environments of launchers: those that are right, mistakes in them, and soup."""

from __future__ import annotations

import random
from collections.abc import Sequence

Environment = dict[str, str]
# By launcher: rank, size, rank on the host, number on the host; what Slurm says of hosts is apart.
NAMES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": tuple(f"OMPI_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH": tuple(f"MV2_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    "old Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
}
# What is there besides, and tells one from another.
BESIDES = {"Intel MPI": {"I_MPI_HYDRA_UUID": "911d0000-7c62-308b-cd60-0600043d106a"}}
NO_NUMBERS = (
    "",
    " ",
    "abc",
    "1.0",
    " 3",
    "3 ",
    "+3",
    "٣",
    "１",
    "²",
    "1_0",
    "0x1",
    "1e3",
    "nan",
    "True",
    "3\n",
    "1,2",
    "--1",
    "x" * 9000,
)
TOO_MUCH = ("9" * 12, "9" * 5000, str(2**63))


def right(draw: random.Random) -> tuple[str, Environment, tuple[int, int, int, int]]:
    """Return a launcher, its variables, and (rank, size, local rank, local size)."""
    launcher = draw.choice(sorted(NAMES))
    per_host, hosts = draw.randrange(1, 9), draw.randrange(1, 5)
    host, local = draw.randrange(hosts), draw.randrange(per_host)
    rank, size = host * per_host + local, per_host * hosts
    place = (rank, size, local, per_host)
    env = {name: str(value) for name, value in zip(NAMES[launcher], place, strict=True) if name}
    env |= BESIDES.get(launcher, {})
    if launcher.endswith("Slurm"):
        tasks = draw.choice((f"{per_host}(x{hosts})", ",".join([str(per_host)] * hosts)))
        env |= {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(host)}
    return launcher, env, place


def wrong(draw: random.Random) -> tuple[Environment, list[str]]:
    """Return variables with one mistake, and the names of which an error has to name one."""
    launcher, env, (_, size, _, per_host) = right(draw)
    rank_name, size_name, local_name, among_name = NAMES[launcher]
    numbers = [name for name in (*NAMES[launcher], "SLURM_NODEID") if name in env]
    how, name = draw.randrange(7), draw.choice(numbers)
    if how == 0:
        env[name] = draw.choice(NO_NUMBERS)
    elif how == 1:
        env[name] = draw.choice(("-1", "-0", "-" + "9" * 5000, "-7"))
    elif how == 2:
        name = draw.choice((rank_name, size_name))
        env[name] = "0" if name == size_name else draw.choice((str(size), str(size + 5), *TOO_MUCH))
    elif how == 3:
        name = draw.choice((rank_name, size_name))
        del env[name]
        name = "SLURM_NTASKS" if name == "SLURM_STEP_NUM_TASKS" else name  # what Slurm says in its place
    elif how == 4:
        name = local_name
        env[name] = draw.choice((str(per_host), str(per_host + 3), *TOO_MUCH))
    elif how == 5 and among_name:
        name = among_name
        env[name] = draw.choice(("0", str(size + 1), *TOO_MUCH))
    else:
        launcher, env, _ = slurm(draw)
        name = draw.choice(("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"))
        if name == "SLURM_NODEID":
            env[name] = draw.choice(("99", *NO_NUMBERS, *TOO_MUCH))
        else:
            env[name] = draw.choice(
                ("", "a", "0", "3x2", "3(x2", "(x2)", "3(x)", "99(x9)", "3,,2", "9" * 5000, "٣", "1(x-1)", "0(x9)")
            )
    return env, [name]


def slurm(draw: random.Random) -> tuple[str, Environment, tuple[int, int, int, int]]:
    while True:
        found = right(draw)
        if found[0].endswith("Slurm"):
            return found


def soup(draw: random.Random) -> tuple[Environment, Sequence[str]]:
    """Return any variables with any values."""
    names = [name for group in NAMES.values() for name in group if name]
    names += ["SLURM_STEP_ID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_JOB_ID", "PMI_FD"]
    values = (
        *NO_NUMBERS,
        *TOO_MUCH,
        "0",
        "1",
        "2",
        "3",
        "4",
        "-1",
        "2(x3)",
        "1(x999999999)",
        "3,1",
        "1(x2),3",
        "\udcff",
    )
    return {name: draw.choice(values) for name in draw.sample(names, draw.randrange(len(names)))}, names
