"""The command or file that starts a run by a launcher. Pure functions: lists of arguments, never shell strings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from distloop.errors import ConfigError
from distloop.targets import given

TRAIN = ("-m", "distloop", "train")
GRACE = 5  # seconds that Open MPI leaves the others when a rank has ended
WORK, CONFIG, RUNS = PurePosixPath("/work"), PurePosixPath("/config"), "/runs"  # in a container


@dataclass(frozen=True)
class Wanted:
    """What is to be started.

    Attributes:
        arguments: what stands behind ``distloop train``.
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


@dataclass(frozen=True)
class Box:
    """What a container gets of this host; all paths are absolute, without links.

    Attributes:
        folder: is the container's working directory; it is also its home, as the rest cannot be written.
        runs: the directory for run directories, which must be there.
        user: UID:GID to be, so that files belong to who starts it.
        config: the configuration file, if the target is one.
        resume: the path to go on from, if there is one.
        gpus: whether it gets the GPUs, and may lock memory for them.
        variables: names of environment variables that it is to have too.
        image: by default the one for these devices.
    """

    folder: Path
    runs: Path
    user: str
    config: Path | None = None
    resume: Path | None = None
    gpus: bool = False
    variables: tuple[str, ...] = ()
    image: str | None = None


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


def docker(wanted: Wanted, box: Box) -> list[str]:
    """Return the command for one host, on which a container runs an agent with the ranks, as docker/ documents it."""
    ours = given(wanted.arguments)
    options = ["--gpus", "all", "--shm-size", "16g", "--ulimit", "memlock=-1"] if box.gpus else ["--shm-size", "1g"]
    options += ["--read-only", "--tmpfs", "/tmp", "--user", box.user]  # noqa: S108
    options += ["--mount", _mount(box.folder, str(WORK))]
    target, settings = ours.target or "", [*ours.settings]
    if box.config is not None and (inner := _inside(box.config, box)) is not None:
        target = inner
    elif box.config is not None:
        target = str(CONFIG / box.config.name)
        options += ["--mount", _mount(box.config, target, "readonly")]
    if (runs := _inside(box.runs, box)) is None:
        runs = RUNS
        options += ["--mount", _mount(box.runs, RUNS)]
    settings = [*_without(settings, "--log.directory"), "--log.directory", runs]
    if ours.resume is not None:
        settings += ["--resume", ours.resume if box.resume is None else _resumed(box.resume, box, runs)]
    settings += [] if ours.ranks is None else ["--simulate", str(ours.ranks)]
    settings += ["--traceback"] if ours.traceback else []
    variables = [f"PET_NPROC_PER_NODE={wanted.ranks}", *box.variables]  # those without a value are taken over
    options += [word for variable in variables for word in ("--env", variable)]
    image = box.image or ("distloop:cuda" if box.gpus else "distloop:cpu")
    return ["docker", "run", "--rm", *options, image, "train", target, *settings]


def _inside(path: Path, box: Box) -> str | None:
    """Return what the container calls a path, if it is in the folder that it sees."""
    return str(WORK / path.relative_to(box.folder)) if path.is_relative_to(box.folder) else None


def _resumed(path: Path, box: Box, runs: str) -> str:
    if path.is_relative_to(box.runs):
        return str(PurePosixPath(runs) / path.relative_to(box.runs))
    if (inner := _inside(path, box)) is None:
        raise ConfigError(f"command line --resume: {path}: the container sees {box.folder} and {box.runs} alone")
    return inner


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
        wanted: its arguments go into the script.
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
