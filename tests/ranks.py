"""Ranks for tests: threads of this process, gloo processes forked from a server that has imported torch once, MPI's."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distloop.transports import Alone, ThreadCluster, Transport

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.warm"])


def in_threads(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(transport, *arguments)`` on every rank of a cluster of threads; return the results by rank."""
    if size == 1:
        return [function(Alone(), *arguments)]
    return ThreadCluster(size, timeout=20).run(lambda transport: function(transport, *arguments))


def in_processes(size: int, function: Callable[..., Any], *arguments: Any, over: str = "torch") -> list[Any]:
    """Call ``function(transport, *arguments)`` on every rank of a process group; return the results by rank."""
    results = _CONTEXT.Queue()
    port = free_port()
    ranks = [
        _CONTEXT.Process(target=_rank, args=(rank, size, port, over, results, function, arguments))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        found: dict[int, Any] = {}
        for _ in ranks:
            rank, value, failure = pickle.loads(results.get(timeout=90))
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            found[rank] = value
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return [found[rank] for rank in range(size)]


def _own_ports() -> Iterator[int]:
    """Yield ports in turn that no other worker of this test run yields, nor the system gives to whoever asks for any.

    Between the moment when one is found free and that when a rank listens there, others ask for ports all the time.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw8").removeprefix("gw"))  # 8 workers, and who has none
    first = 12_000 + 2_000 * worker
    return itertools.cycle([first + (os.getpid() + n) % 2_000 for n in range(2_000)])


_ports = _own_ports()


def free_port() -> int:
    for port in _ports:
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as whoever will listen there does
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("never reached")


def _rank(
    rank: int,
    size: int,
    port: int,
    over: str,
    results: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    from distloop.transports.join import join
    from distloop.world import World

    _settle_in()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    transport: Transport = Alone()
    try:
        if size > 1:
            world = World(rank, size, rank, size, "test")
            transport, notes = join(world, over, timeout=30)
            assert not notes, notes
        value = function(transport, *arguments)
        transport.close()
        results.put(pickle.dumps((rank, value, None)))  # torch's own way would leave tensors in shared memory
    except BaseException:
        results.put(pickle.dumps((rank, None, traceback.format_exc())))
        results.close()
        results.join_thread()
        os._exit(1)


def _settle_in() -> None:
    """Be what a process of its own would be."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # or workers of a DataLoader come from a fork server of the rank


ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mpi:
    """An MPI to test with: how it starts ranks, and what tells mpi4py to use it."""

    name: str
    command: tuple[str, ...]
    options: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()

    def missing(self) -> str | None:
        """Return why it cannot be used here, if so."""
        try:
            import mpi4py  # noqa: F401
        except ImportError:
            return 'mpi4py is not installed: pip install "distloop[mpi]"'
        if shutil.which(self.command[0]) is None:
            return f"{self.name} is not set up: {'make test-mpich' if self.name == 'MPICH' else 'no mpirun'}"
        version = subprocess.run([self.command[0], "--version"], capture_output=True, text=True, check=False).stdout
        return None if self.name != "Open MPI" or self.name in version else "mpirun is another MPI's"


_own = Path(sys.executable).with_name("mpirun")  # also where the environment is not activated
_root = (("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"))
_mpich = ROOT / ".mpich"
OPEN_MPI = Mpi("Open MPI", (str(_own) if _own.exists() else "mpirun",), ("--map-by", ":OVERSUBSCRIBE"), _root)
MPICH = Mpi(
    "MPICH",
    (str(_mpich / "bin" / "mpiexec"),),
    variables=(("LD_LIBRARY_PATH", str(_mpich / "lib")), ("MPI4PY_MPIABI", "mpich")),
)


def mpirun(
    size: int, *arguments: str, folder: Path, mpi: Mpi = OPEN_MPI, seconds: float = 90, **variables: str
) -> Ended:
    """Run ``python ARGUMENTS`` in ``folder`` as ranks of an MPI job; return how the job ended."""
    command = [*mpi.command, "-n", str(size), *mpi.options, sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | dict(mpi.variables) | variables
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    ) as job:
        try:
            out, err = job.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            job.terminate()  # mpirun ends its ranks
            out, err = job.communicate(timeout=20)
            raise AssertionError(f"the job hangs:\n{out}\n{err}") from None
    return Ended(job.returncode, out, err)


def under_mpirun(size: int, function: Callable[..., Any], *arguments: Any, mpi: Mpi = OPEN_MPI) -> list[Any]:
    """Call ``function(transport, *arguments)`` on every rank of an MPI job; return the results by rank."""
    with tempfile.TemporaryDirectory() as name:
        task = Path(name, "task")
        task.write_bytes(pickle.dumps((function, arguments)))
        ended = mpirun(size, "-m", "tests.mpi_rank", str(task), folder=Path(name), mpi=mpi)
        assert ended.code == 0, f"{ended.out}\n{ended.err}"
        assert ended.err == "", ended.err
        return [pickle.loads(Path(f"{task}.{rank}").read_bytes()) for rank in range(size)]


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    at: float = 0.0  # the time


def command(arguments: list[str]) -> None:
    """Be ``distloop ARGUMENTS``."""
    from distloop.cli import main

    main(arguments)


def script(arguments: list[str]) -> None:
    """Be ``python ARGUMENTS``."""
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


class Job:
    """``distloop ARGUMENTS`` in ``folder``, as one process or as ranks of one world, under way.

    With ``main=script`` it is ``python ARGUMENTS``.
    """

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        ranks: int = 1,
        main: Callable[[list[str]], None] = command,
        **variables: str,
    ):
        world: list[dict[str, str]] = [{}]
        if ranks > 1:
            # As under torchrun, the store outlives every rank.
            self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
            world = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self._outputs = [(folder / f".out{rank}", folder / f".err{rank}") for rank in range(ranks)]
        for path in (path for pair in self._outputs for path in pair):
            path.unlink(missing_ok=True)
        self.processes = [
            _CONTEXT.Process(target=_run, args=(main, arguments, str(folder), own | variables, str(out), str(err)))
            for own, (out, err) in zip(world, self._outputs, strict=True)
        ]
        for process in self.processes:
            process.start()
        self._ended = [0.0] * ranks

    def wait(self, seconds: float, ranks: Iterable[int] | None = None) -> bool:
        """Return whether these ranks, or all, have ended, within so many seconds."""
        chosen = range(len(self.processes)) if ranks is None else ranks
        waiting = {self.processes[rank].sentinel: rank for rank in chosen if not self._ended[rank]}
        deadline = time.monotonic() + seconds
        while waiting and (
            ready := multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        ):
            for sentinel in ready:
                self._ended[waiting.pop(sentinel)] = time.time()
        return not waiting

    def running(self) -> list[int]:
        """Return the ranks that have not ended."""
        self.wait(0)
        return [rank for rank, ended in enumerate(self._ended) if not ended]

    def send(self, rank: int, number: int) -> None:
        """Send a rank a signal, if it has not ended."""
        pid = self.processes[rank].pid
        if pid is not None and self.processes[rank].exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> list[Ended]:
        """Kill who has not ended; return how each rank ended."""
        self.wait(0)
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        return [
            Ended(
                process.exitcode or 0,
                out.read_text() if out.exists() else "",
                err.read_text() if err.exists() else "",
                ended,
            )
            for process, (out, err), ended in zip(self.processes, self._outputs, self._ended, strict=True)
        ]


def run_command(
    *arguments: str,
    folder: Path,
    ranks: int = 1,
    seconds: float = 60,
    stays: int | None = None,
    main: Callable[[list[str]], None] = command,
    **variables: str,
) -> list[Ended]:
    """Run ``distloop ARGUMENTS`` in ``folder``, as one process or as ranks of one world; return how each ended.

    Rank ``stays`` is not waited for, and killed in the end. With ``main=script`` it is ``python ARGUMENTS``.
    """
    job = Job(*arguments, folder=folder, ranks=ranks, main=main, **variables)
    job.wait(seconds, [rank for rank in range(ranks) if rank != stays])
    return job.end()


def _run(
    main: Callable[[list[str]], None],
    arguments: Sequence[str],
    folder: str,
    variables: dict[str, str],
    out: str,
    err: str,
) -> None:
    os.chdir(folder)
    os.environ |= variables
    _settle_in()
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    main(list(arguments))
