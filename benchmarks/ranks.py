"""Starts the ranks of a benchmark, one process each, and talks with rank 0 of them by lines of JSON.

The starting side calls ``run``, ranks call ``tell`` and ``ask``. A group of ranks is bounded in time; whatever happens,
its processes are gone when ``run`` has returned.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from emulated import Hosts, Unavailable

MARK = "> "  # begins a line of rank 0 that is meant for the starting side


class Failed(Exception):  # noqa: N818 (it is what happened to the ranks)
    """Ranks ended as they should not."""


Answer = Callable[[dict[str, Any]], None]


def tell(message: Mapping[str, Any]) -> None:
    """Send a message to the starting side."""
    print(MARK + json.dumps(message), flush=True)


def ask(message: Mapping[str, Any]) -> None:
    """Send a message and wait until it has been acted upon."""
    tell(message)
    if not sys.stdin.readline():
        raise SystemExit("the benchmark that started this rank is gone")


def run(
    program: Sequence[str],
    size: int,
    *,
    hosts: Hosts | None = None,
    mpi: bool = False,
    limit: float = 300.0,
    answer: Answer | None = None,
) -> list[dict[str, Any]]:
    """Run Python's ``program`` on ``size`` ranks; return what rank 0 tells, except what ``answer`` is for.

    Args:
        program: a file and its arguments.
        size: ranks, dealt evenly to the hosts.
        hosts: where they run; None for this machine itself.
        mpi: start them by mpirun.
        limit: seconds, after which they are killed.
        answer: acts upon a message with the key ``do``, for which rank 0 waits.

    Raises:
        Failed: a rank failed or the time was up; has the end of what the first of them wrote.
        Unavailable: there is no MPI.
    """
    command = [sys.executable, *program]
    with contextlib.ExitStack() as stack:
        if mpi:
            errors = [stack.enter_context(tempfile.TemporaryFile("w+"))]
            processes = [_start([*_mpirun(size), *command], mpi_environment(), errors[0], speaks=True)]
        else:
            port = _free_port() if hosts is None else 29500
            errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(size)]
            processes = []
            stack.callback(_end, processes)
            for rank in range(size):
                variables, host = environment(rank, size, hosts, port)
                whole = command if hosts is None else hosts.command(host, command)
                processes.append(_start(whole, variables, errors[rank], speaks=rank == 0))
        stack.callback(_end, processes)
        watch = threading.Timer(limit, _end, [processes])
        stack.callback(watch.cancel)
        watch.start()
        heard = _listen(processes[0], answer)
        codes = [process.wait() for process in processes]
        if any(codes):
            failed = next((i for i, code in enumerate(codes) if code > 0), 0)
            errors[failed].seek(0)
            raise Failed(
                f"{Path(program[0]).name} ended with {codes}; rank {failed} wrote:\n{errors[failed].read()[-3000:]}"
            )
        return heard


def environment(rank: int, size: int, hosts: Hosts | None, port: int) -> tuple[dict[str, str], int]:
    """Return the variables that torchrun would set for a rank, and the number of its host."""
    per_host = size if hosts is None else size // hosts.count
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % per_host, "LOCAL_WORLD_SIZE": per_host}
    texts = {name: str(number) for name, number in variables.items()}
    texts |= {"MASTER_ADDR": "127.0.0.1" if hosts is None else hosts.addresses[0], "MASTER_PORT": str(port)}
    texts |= {"GLOO_SOCKET_IFNAME": "lo" if hosts is None else "eth0", "OMP_NUM_THREADS": "1"}
    return texts, rank // per_host


def mpi_environment() -> dict[str, str]:
    """Return the variables that let Open MPI start more ranks than there are cores, unbound, and as root."""
    return {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }


def _mpirun(size: int) -> list[str]:
    program = shutil.which("mpirun")
    if program is None or importlib.util.find_spec("mpi4py") is None:
        raise Unavailable("there is no mpirun" if program is None else "there is no mpi4py")
    return [program, "-n", str(size)]


def _start(command: list[str], variables: dict[str, str], errors: IO[str], *, speaks: bool) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=os.environ | variables,
        stdin=subprocess.PIPE if speaks else subprocess.DEVNULL,
        stdout=subprocess.PIPE if speaks else subprocess.DEVNULL,
        stderr=errors,
        text=True,
        bufsize=1,
        start_new_session=True,  # Ctrl-C is for the benchmark, which then ends them
    )


def _listen(process: subprocess.Popen[str], answer: Answer | None) -> list[dict[str, Any]]:
    assert process.stdout is not None and process.stdin is not None
    heard = []
    for line in process.stdout:
        if not line.startswith(MARK):
            continue
        message = json.loads(line.removeprefix(MARK))
        if "do" in message and answer is not None:
            answer(message["do"])
            process.stdin.write("\n")
        else:
            heard.append(message)
    return heard


def _end(processes: list[subprocess.Popen[str]]) -> None:
    """End the processes that still run: gently first, since mpirun must end its ranks."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
