"""The command or file that starts a run by a launcher. Pure functions: lists of arguments, never shell strings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

TRAIN = ("-m", "distloop", "train")
GRACE = 5  # seconds that Open MPI leaves the others when a rank has ended
IN_CONTAINER = Path("/config")
RUNS_IN_CONTAINER = "/runs"


@dataclass(frozen=True)
class Wanted:
    """What is to be started.

    Attributes:
        arguments: what stands behind ``distloop train``: target and settings.
        python: the interpreter.
        nodes: how many hosts.
        ranks: how many on each.
        master: ADDRESS:PORT where hosts meet; of several hosts alone.
    """

    arguments: tuple[str, ...]
    python: str = "python"
    nodes: int = 1
    ranks: int = 1
    master: str = ""


def local(wanted: Wanted) -> list[str]:
    """Return the command for one process, without a launcher."""
    return [wanted.python, *TRAIN, *wanted.arguments]


def torchrun(wanted: Wanted, node: int = 0) -> list[str]:
    """Return the command for host number ``node``."""
    where = ["--nnodes", str(wanted.nodes), "--nproc-per-node", str(wanted.ranks)]
    if wanted.nodes == 1:
        where += ["--standalone"]
    else:
        address, _, port = wanted.master.rpartition(":")
        where += ["--node-rank", str(node), "--master-addr", address.strip("[]"), "--master-port", port]
    return [wanted.python, "-m", "distloop.agent", *where, *TRAIN, *wanted.arguments]


def mpirun(wanted: Wanted, program: str = "mpirun", *, mpich: bool = False) -> list[str]:
    """Return the command for all ranks; ranks of several hosts go where the MPI is told by its own means."""
    placed = ["-ppn", str(wanted.ranks)] if mpich else ["--map-by", f"ppr:{wanted.ranks}:node:OVERSUBSCRIBE"]
    options = [] if mpich else ["--mca", "odls_base_sigkill_timeout", str(GRACE)]
    ranks = str(wanted.nodes * wanted.ranks)
    return [program, "-n", ranks, *options, *placed, *local(wanted)]


def docker(wanted: Wanted, *, gpus: bool, config: Path | None, runs: Path, user: str | None = None) -> list[str]:
    """Return the command for one host, on which a container runs torchrun.

    Args:
        wanted: its arguments begin with the target, that is ``config`` if this is given.
        gpus: whether the container gets the GPUs, and may lock memory for them.
        config: the absolute path of the configuration file.
        runs: the absolute path of the directory for run directories, which must be there.
        user: UID:GID to be, so that files belong to who starts it.
    """
    target, *settings = wanted.arguments
    options = ["--gpus", "all", "--ulimit", "memlock=-1"] if gpus else []
    options += ["--user", user] if user else []
    options += ["--mount", _mount(runs, RUNS_IN_CONTAINER)]
    if config is not None:
        target = str(IN_CONTAINER / config.name)
        options += ["--mount", _mount(config, target, "readonly")]
    started = ["launch", "--via", "torchrun", "--ranks-per-node", str(wanted.ranks)]
    settings = [*_without(settings, "--log.directory"), "--log.directory", RUNS_IN_CONTAINER]
    return ["docker", "run", "--rm", "--init", "--ipc=host", *options, "distloop", *started, target, *settings]


def _without(settings: Sequence[str], name: str) -> list[str]:
    """Return settings less one, be it ``NAME VALUE`` or ``NAME=VALUE``."""
    kept = [word for before, word in zip(["", *settings], settings, strict=False) if name not in (before, word)]
    return [word for word in kept if not word.startswith(f"{name}=")]


def _mount(source: Path, target: str, *more: str) -> str:
    """Return a mount as docker reads it: a line of CSV."""
    fields = ["type=bind", f"src={source}", f"dst={target}", *more]
    return ",".join('"' + field.replace('"', '""') + '"' if set(field) & set(',"') else field for field in fields)


def slurm(wanted: Wanted, *, agents: bool = False, time: str = "01:00:00", folder: str = "") -> str:
    """Return the script for sbatch.

    Args:
        wanted: its target and settings go into the script.
        agents: one torchrun per node instead of a task of srun for each rank.
        time: the limit, as sbatch reads it.
        folder: where ``python`` is, if it is to be found there before elsewhere.
    """
    name = "torchrun.sbatch" if agents else "train.sbatch"
    text = resources.files("distloop.launching").joinpath(name).read_text(encoding="utf-8")
    text = _option(_option(text, "nodes", str(wanted.nodes)), "time", time)
    begin = [f"set -- {shlex.join(wanted.arguments)}"]
    if agents:
        begin.insert(0, f"RANKS={wanted.ranks}")
    else:
        text = _option(text, "ntasks-per-node", str(wanted.ranks))
    if folder:
        begin.insert(0, f"export PATH={shlex.quote(folder)}:$PATH")
    head, mark, rest = text.partition("set -uo pipefail\n")
    return head + mark + "\n".join(begin) + "\n" + rest


def _option(text: str, name: str, value: str) -> str:
    return re.sub(rf"^(#SBATCH --{name}=).*$", lambda found: found[1] + value, text, flags=re.MULTILINE)


def shown(command: Sequence[str]) -> str:
    """Return a command as it can be pasted into a shell."""
    return shlex.join(command)
