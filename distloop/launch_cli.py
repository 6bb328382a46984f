"""``distloop launch``: the command or file that starts a run by a launcher, shown or carried out."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from distloop.ending import leave
from distloop.errors import ConfigError, WorldError
from distloop.launching import commands
from distloop.launching.commands import Box, Wanted
from distloop.launching.waiting import wait_for
from distloop.report import machine, mpi
from distloop.targets import SETTINGS_FOLLOW, given

if TYPE_CHECKING:
    from distloop.settings import Resolved

PROGRAMS = {"mpirun": "install an MPI", "docker": "install Docker", "slurm": "start it where Slurm's commands are"}
VIA = ("local", "torchrun", "mpirun", "slurm", "docker")


@click.command(context_settings=SETTINGS_FOLLOW, short_help="Start a run by a launcher, or show how.")
@click.argument("target", required=False)
@click.option("--via", type=click.Choice(VIA), required=True, help="What starts the ranks.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="How many hosts.")
@click.option("--ranks-per-node", "ranks", type=click.IntRange(1), default=1, show_default=True, help="On each host.")
@click.option("--master", metavar="ADDRESS:PORT", default="", help="torchrun on several hosts: where they meet.")
@click.option("--node-rank", "node", type=click.IntRange(0), help="torchrun on several hosts: which this one is.")
@click.option("--time", default="01:00:00", show_default=True, help="slurm: the limit, as sbatch reads it.")
@click.option("--agents", is_flag=True, help="slurm: one torchrun per node, instead of a task for each rank.")
@click.option("--image", help="docker: the image  [default: distloop:cuda where there are GPUs, else distloop:cpu]")
@click.option("--print", "only_print", is_flag=True, help="Show the command or file, and start nothing.")
@click.option("--traceback", is_flag=True, help="Show where in the code an error comes from.")
@click.pass_context
def launch(
    context: click.Context,
    target: str | None,
    via: str,
    nodes: int,
    ranks: int,
    master: str,
    node: int | None,
    time: str,
    agents: bool,
    image: str | None,
    only_print: bool,
    traceback: bool,
) -> None:
    """Start TARGET, a configuration or a task, by a launcher.

    Behind it stands what train takes, which is checked before anything starts. --print shows what would be started:

        distloop launch --via torchrun --ranks-per-node 4 --print configs/digits.yaml --optimizer.lr 0.1
    """
    from distloop.failure import guarded

    def work() -> int:
        words = [*([] if target is None else [target]), *context.args, *(["--traceback"] if traceback else [])]
        wanted = Wanted(tuple(words), sys.executable, nodes, ranks, master)
        resolved = _checked(wanted, via, node, only_print=only_print)
        if via == "slurm":
            folder = str(Path(sys.executable).parent)
            script = commands.slurm(wanted, agents=agents, time=time, folder=folder)
            return _print(script.rstrip("\n")) if only_print else _submit(script)
        if via == "torchrun" and node is None and nodes > 1:
            return _print("\n".join(commands.shown(commands.torchrun(wanted, host)) for host in range(nodes)))
        box = _box(wanted, resolved, image, make_runs=not only_print) if via == "docker" else None
        command = _command(wanted, via, node or 0, box, only_print=only_print)
        return _print(commands.shown(command)) if only_print else _run(command, via)

    guarded(work, traceback=traceback)


def _checked(wanted: Wanted, via: str, node: int | None, *, only_print: bool) -> Resolved:
    """Return the configuration; refuse what train would refuse, and what the launcher cannot do."""
    from distloop.build import check

    words = given(wanted.arguments)
    resolved = words.resolved()
    check(resolved)
    several = wanted.nodes > 1
    if words.ranks is not None and wanted.nodes * wanted.ranks > 1:
        raise ConfigError(f"command line --simulate: {words.ranks} ranks are made in one process: leave out the others")
    if via == "local" and (several or wanted.ranks > 1):
        raise ConfigError("command line --via local: is one process: leave out --nodes and --ranks-per-node")
    if via == "docker" and several:
        raise ConfigError("command line --via docker: is one host: leave out --nodes")
    if via == "torchrun" and several:
        if re.fullmatch(r".+:[0-9]{1,5}", wanted.master) is None:
            raise ConfigError("command line --master: ADDRESS:PORT, where the hosts meet, is missing")
        if node is None and not only_print:
            raise ConfigError("command line --node-rank: is missing: start this on each host, with 0, 1, ...")
        if node is not None and node >= wanted.nodes:
            raise ConfigError(f"command line --node-rank: {node} is outside 0 to {wanted.nodes - 1}")
    return resolved


def _command(wanted: Wanted, via: str, node: int, box: Box | None, *, only_print: bool) -> list[str]:
    if box is not None:
        return commands.docker(wanted, box)
    if via == "local":
        return commands.local(wanted)
    if via == "torchrun":
        return commands.torchrun(wanted, node)
    path, vendor, line = mpi.mpirun()
    program = "mpirun" if path is None else Path(path).name
    if path is not None and vendor is None and not only_print:
        raise WorldError(f"--via mpirun: {path} is neither Open MPI's nor MPICH's: {line}")
    return commands.mpirun(wanted, program, mpich=vendor in mpi.FAMILY)  # without one, it is to be Open MPI's


def _box(wanted: Wanted, resolved: Resolved, image: str | None, *, make_runs: bool) -> Box:
    words, config = given(wanted.arguments), resolved.config
    target, runs = Path(words.target or ""), Path(config.log.directory).resolve()
    if words.target is None:
        raise ConfigError("command line: TARGET is missing: a container needs it also with --resume PATH")
    if make_runs:
        runs.mkdir(parents=True, exist_ok=True)  # docker would make it root's
    device = config.world.device
    return Box(
        Path.cwd().resolve(),
        runs,
        f"{os.getuid()}:{os.getgid()}",
        target.resolve() if target.is_file() else None,
        None if words.resume in (None, "auto") else Path(words.resume or "").resolve(),
        device == "cuda" or (device == "auto" and _has_gpus()),
        tuple(sorted(name for name in os.environ if name.startswith("DISTLOOP_"))),
        image,
    )


def _has_gpus() -> bool:
    return Path("/dev/nvidia0").exists() or machine.gpus()[0][:1].isdigit()


def _print(text: str) -> int:
    print(text)
    return 0


def _submit(script: str) -> int:
    _find("sbatch", "slurm")
    return subprocess.run(["sbatch"], input=script, text=True, check=False).returncode


def _run(command: list[str], via: str) -> int:
    """Become the command; mpirun's is waited for, as it would kill ranks that are to save."""
    _find(command[0], via)
    sys.stdout.flush()
    if via != "mpirun":
        _become(command)
    leave(wait_for(command))


def _become(command: list[str]) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)  # noqa: S606


def _find(program: str, via: str) -> None:
    if shutil.which(program) is None:
        raise WorldError(f"--via {via}: {program} is not to be found on this machine: {PROGRAMS[via]}, or use --print")
