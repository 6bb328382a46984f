"""``distloop launch``: the command or file that starts a run by a launcher, shown or carried out."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import click

from distloop.ending import leave
from distloop.errors import ConfigError, WorldError
from distloop.launching import commands
from distloop.launching.commands import Wanted
from distloop.targets import resolve

SETTINGS_FOLLOW = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h", "--help"]}
PROGRAMS = {"mpirun": "install an MPI", "docker": "install Docker", "slurm": "start it where Slurm's commands are"}
VIA = ("local", "torchrun", "mpirun", "slurm", "docker")


@click.command(context_settings=SETTINGS_FOLLOW, short_help="Start a run by a launcher, or show how.")
@click.argument("target")
@click.option("--via", type=click.Choice(VIA), required=True, help="What starts the ranks.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="How many hosts.")
@click.option("--ranks-per-node", "ranks", type=click.IntRange(1), default=1, show_default=True, help="On each host.")
@click.option("--master", metavar="ADDRESS:PORT", default="", help="torchrun on several hosts: where they meet.")
@click.option("--node-rank", "node", type=click.IntRange(0), help="torchrun on several hosts: which this one is.")
@click.option("--time", default="01:00:00", show_default=True, help="slurm: the limit, as sbatch reads it.")
@click.option("--agents", is_flag=True, help="slurm: one torchrun per node, instead of a task for each rank.")
@click.option("--print", "only_print", is_flag=True, help="Show the command or file, and start nothing.")
@click.option("--traceback", is_flag=True, help="Show where in the code an error comes from.")
@click.pass_context
def launch(
    context: click.Context,
    target: str,
    via: str,
    nodes: int,
    ranks: int,
    master: str,
    node: int | None,
    time: str,
    agents: bool,
    only_print: bool,
    traceback: bool,
) -> None:
    """Start TARGET, a configuration or a task, by a launcher.

    The configuration is checked before anything starts. With --print, what would be started is shown instead:

        distloop launch --via torchrun --ranks-per-node 4 --print configs/digits.yaml --optimizer.lr 0.1
    """
    from distloop.failure import guarded

    def work() -> int:
        wanted = Wanted((target, *context.args), sys.executable, nodes, ranks, master)
        _check(wanted, via, node, only_print=only_print)
        if via == "slurm":
            folder = str(Path(sys.executable).parent)
            script = commands.slurm(wanted, agents=agents, time=time, folder=folder)
            return _print(script.rstrip("\n")) if only_print else _submit(script)
        if via == "torchrun" and node is None and nodes > 1:
            return _print("\n".join(commands.shown(commands.torchrun(wanted, host)) for host in range(nodes)))
        command = _command(wanted, via, node or 0, make_runs=not only_print)
        return _print(commands.shown(command)) if only_print else _run(command, via)

    guarded(work, traceback=traceback)


def _check(wanted: Wanted, via: str, node: int | None, *, only_print: bool) -> None:
    """Refuse what train would refuse, and what the launcher cannot do."""
    from distloop.build import check

    check(resolve(wanted.arguments[0], list(wanted.arguments[1:])))
    several = wanted.nodes > 1
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


def _command(wanted: Wanted, via: str, node: int, *, make_runs: bool) -> list[str]:
    if via == "local":
        return commands.local(wanted)
    if via == "torchrun":
        return commands.torchrun(wanted, node)
    if via == "mpirun":
        return commands.mpirun(wanted, mpich=_mpich())
    config = resolve(wanted.arguments[0], list(wanted.arguments[1:])).config
    path, runs, uid = Path(wanted.arguments[0]), Path(config.log.directory).absolute(), os.getuid()
    if make_runs:
        runs.mkdir(parents=True, exist_ok=True)  # docker would make it root's
    return commands.docker(
        wanted,
        gpus=config.world.device != "cpu",
        config=path.absolute() if path.is_file() else None,
        runs=runs,
        user=f"{uid}:{os.getgid()}" if uid else None,
    )


def _mpich() -> bool:
    """Return whether mpirun is MPICH's or of its family; without one, it is to be Open MPI's."""
    try:
        said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "HYDRA" in said or "Intel" in said


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
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as job:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: job.send_signal(signal.SIGUSR1))
        code = job.wait()
    leave(code if code >= 0 else 128 - code)


def _become(command: list[str]) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)  # noqa: S606


def _find(program: str, via: str) -> None:
    if shutil.which(program) is None:
        raise WorldError(f"--via {via}: {program} is not to be found on this machine: {PROGRAMS[via]}, or use --print")
