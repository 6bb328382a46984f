"""Which MPI mpi4py loads, and whose mpirun is on PATH: another MPI's starts N worlds of one rank."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

from distloop.report.versions import MISSING, package

# In a process of its own: a broken MPI ends the process that loads it. MPI is not begun, so no launcher is disturbed.
ASK = """
import json, mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
name, version = MPI.get_vendor()
print(json.dumps([name, ".".join(map(str, version)), MPI.Get_library_version()]))
"""
SECONDS = 20.0
INSTALL = 'pip install "distloop[mpi]"'
# How the mpirun of each MPI names itself, by the vendor that mpi4py knows it as; launch/mpirun.sh has them too. In this
# order: what is of MPICH's family may say how it was configured, and name others in that.
LAUNCHERS = {
    "Intel MPI": r"Intel\(R\) MPI",
    "MVAPICH": r"MVAPICH",
    "MPICH": r"HYDRA|MPICH",
    "Open MPI": r"Open MPI|OpenRTE|PRRTE",
}
FAMILY = {"MPICH", "Intel MPI", "MVAPICH"}  # they start each other's ranks


@dataclass(frozen=True)
class Library:
    """The MPI that mpi4py loads."""

    vendor: str
    version: str
    described: str


def library() -> Library | str:
    """Return the MPI, or why there is none."""
    if package("mpi4py")() == MISSING:
        return f"mpi4py is not installed ({INSTALL})"
    apart = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI", "PRTE"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=apart,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"mpi4py finds no MPI ({reason})"
    vendor, version, described = json.loads(lines[-1])
    return Library(vendor, version, re.split(r"[,\n\0]", described)[0].strip())


def found() -> str:
    """Return in words which MPI mpi4py loads."""
    mpi = library()
    return mpi if isinstance(mpi, str) else f"{mpi.vendor} {mpi.version} ({mpi.described})"


def launcher() -> str:
    """Return in words which mpirun is on PATH."""
    path, vendor, line = mpirun()
    return "none on PATH" if path is None else f"{path}: {vendor or 'of an MPI that is not known'} ({line})"


def mpirun() -> tuple[str | None, str | None, str]:
    """Return the path of mpirun, whose it is, and the line that tells."""
    path = shutil.which("mpirun") or shutil.which("mpiexec")
    if path is None:
        return None, None, ""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as failure:
        return path, None, f"--version: {failure}"
    told = done.stdout + done.stderr
    vendor = next((vendor for vendor, sign in LAUNCHERS.items() if re.search(sign, told)), None)
    return path, vendor, (told.strip().splitlines() or ["it says nothing"])[0].strip()


def belongs(vendor: str | None, library: str) -> bool:
    """Return whether an mpirun of this vendor starts ranks that this MPI sees as one world."""
    return vendor == library or {vendor, library} <= FAMILY
