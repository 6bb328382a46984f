"""The MPI behind mpi4py: found, begun and ended, and asked what it knows of hosts and GPUs."""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING

import numpy as np

from distloop.errors import WorldError
from distloop.world import World

if TYPE_CHECKING:
    from mpi4py import MPI

INSTALL = 'pip install "distloop[mpi]"'


def join(world: World, *, timeout: float) -> MPI.Intracomm:
    """Begin MPI, unless that is done, and return the communicator of all its ranks.

    MPI is ended at the end of the process, if that ends well; or by whoever began it.

    Raises:
        WorldError: there is no MPI, or it sees another world than the launcher's variables.
    """
    _load()
    from mpi4py import MPI

    _check_vendor(world, MPI.get_vendor()[0])
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        _farewell.append(MPI.COMM_WORLD.Dup())
    if _farewell:
        atexit.unregister(_end)
        atexit.register(_end, timeout)  # not before, so that a process may train twice
    found = MPI.COMM_WORLD
    if (found.size, found.rank) != (world.size, world.rank):
        raise WorldError(
            f"{world.launcher} started this process as rank {world.rank} of {world.size}, which "
            f"{MPI.get_vendor()[0]} takes for rank {found.rank} of {found.size}: start with the mpirun of "
            f"{MPI.get_vendor()[0]}, or set world.transport to torch",
            everywhere=True,
        )
    return found


def stay() -> None:
    """Do not end MPI at the end of the process: mpirun sees from that that something is wrong, and ends the others."""
    atexit.unregister(_end)


_farewell: list[MPI.Intracomm] = []  # one, for the ranks' last meeting, if MPI was begun here


def _end(timeout: float) -> None:
    """End MPI if all ranks come to this. It would wait for ever for a rank that goes on, or goes under."""
    from mpi4py import MPI

    if MPI.Is_finalized() or hasattr(sys, "last_value"):  # this rank ends by an exception that nobody caught
        return
    barrier, begun = _farewell[0].Ibarrier(), time.monotonic()
    while not barrier.Test():
        if time.monotonic() - begun > timeout:
            return
        time.sleep(1e-3)
    MPI.Finalize()


def _load() -> None:
    """Import mpi4py without beginning MPI: a wrong mpirun is to be found before MPI prints pages about it."""
    if importlib.util.find_spec("mpi4py") is None:
        raise WorldError(f"world.transport: mpi needs the package mpi4py: {INSTALL}", everywhere=True)
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a wrong mpirun: it is refused below
            from mpi4py import MPI  # noqa: F401
    except (ImportError, RuntimeError) as failure:
        reason = (str(failure).strip().splitlines() or ["no reason given"])[0]
        raise WorldError(
            f"world.transport: mpi4py finds no MPI ({reason}): load your cluster's, or {INSTALL}", everywhere=True
        ) from failure


def _check_vendor(world: World, vendor: str) -> None:
    """Refuse an mpirun of which the MPI here knows nothing: every rank would be alone in its eyes."""
    foreign = world.launcher == "Open MPI" and vendor != "Open MPI"
    foreign |= world.launcher == "MPICH" and vendor == "Open MPI" and "PMIX_RANK" not in os.environ
    if foreign:
        raise WorldError(
            f"the mpirun that started these {world.size} ranks is that of {world.launcher}, but mpi4py found {vendor}, "
            f"for which each of them is alone: start with the mpirun of {vendor}",
            everywhere=True,
        )


def hosts(world: MPI.Intracomm) -> list[int]:
    """Return, by rank, the number of its host."""
    from mpi4py import MPI

    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    first = np.array([world.rank], dtype=np.int64)
    host.Allreduce(MPI.IN_PLACE, [first, 1, MPI.INT64_T], MPI.MIN)
    host.Free()
    firsts = np.empty(world.size, dtype=np.int64)
    world.Allgather([first, 1, MPI.INT64_T], [firsts, 1, MPI.INT64_T])
    numbers = {rank: number for number, rank in enumerate(sorted(set(firsts.tolist())))}
    return [numbers[rank] for rank in firsts.tolist()]


def cuda_aware() -> bool:
    """Return whether MPI says that it reads and writes the memory of GPUs itself."""
    from mpi4py import MPI

    if MPI.get_vendor()[0] != "Open MPI":
        names = ("MPIR_CVAR_ENABLE_GPU", "MPICH_GPU_SUPPORT_ENABLED", "I_MPI_OFFLOAD")
        return any(os.environ.get(name, "0") not in ("", "0") for name in names)
    try:
        return bool(ctypes.CDLL("libmpi.so.40").MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return False
