"""GPUs, MPI and DeepSpeed: whether what is installed fits what is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from distloop import native
from distloop.doctor.findings import Context, Finding, failed, ok, warning
from distloop.errors import DistloopError
from distloop.report import machine, mpi, versions

CUDA_AWARE = (
    "import mpi4py; mpi4py.rc.initialize = mpi4py.rc.finalize = False\n"
    "from distloop.transports.mpi_library import cuda_aware; print(cuda_aware())"
)
NEEDED = {"deepspeed": "deepspeed"}  # the package that a strategy is a guest of


def gpus(context: Context) -> Iterator[Finding]:
    """Compare what the driver sees, what torch sees, and what was asked for."""
    import torch

    seen, driver, asked = torch.cuda.device_count(), machine.gpus(), context.config.world.device
    there = bool(driver) and not driver[0].startswith(("none", "unknown"))
    if not seen:
        reason = f"torch {torch.__version__} is built for {versions.cuda()}"
        if asked == "cuda":
            yield failed("GPUs", f"world.device cuda was asked for, and torch sees no GPU ({reason})", _how(driver))
        elif there:
            yield warning("GPUs", f"{'; '.join(driver)}; but torch sees none ({reason})", _how(driver))
        else:
            yield ok("GPUs", f"none ({'; '.join(driver)})")
        return
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(seen))
    if context.world.host_known and context.world.local_size > seen and asked != "cpu":
        advice = f"start at most {seen} ranks per host, or set world.device to cpu"
        yield failed("GPUs", f"{seen} ({names}) for {context.world.local_size} ranks of this host", advice)
        return
    torch.ones(64, 64, device=torch.device("cuda", context.world.local_rank % seen)).square().sum().item()
    library = ".".join(map(str, torch.cuda.nccl.version()))
    yield ok("GPUs", f"{seen} ({names}), CUDA {torch.version.cuda}, NCCL {library}")
    apart = [
        f"{one}-{other}"
        for one in range(seen)
        for other in range(one + 1, seen)
        if not torch.cuda.can_device_access_peer(one, other)
    ]
    if seen > 1:
        told = f"no peer access between {', '.join(apart)}: they talk through the host" if apart else "all peers reach"
        yield (warning if apart else ok)("peer access", told)


def _how(driver: list[str]) -> str:
    return (
        "install a torch built for CUDA, or mend the driver (nvidia-smi)"
        if "unknown" not in driver[0]
        else f"mend the driver: {driver[0]}"
    )


def message_passing(context: Context) -> Iterator[Finding]:
    """Look which MPI mpi4py loads, and whether the mpirun on PATH is of the same: another's starts worlds of one."""
    wanted = context.world.by_mpirun or context.config.world.transport == "mpi"
    found = mpi.library()
    if isinstance(found, str):
        yield (failed if wanted else ok)("MPI", found)
        return
    yield ok("MPI", f"mpi4py loads {found.vendor} {found.version} ({found.described})")
    path, vendor, line = mpi.mpirun()
    if path is None:
        told = "no mpirun on PATH"
        yield ok("mpirun", told) if context.world.by_mpirun else warning("mpirun", told, f"put {found.vendor}'s there")
    elif mpi.belongs(vendor, found.vendor):
        yield ok("mpirun", f"{path} is {vendor}'s")
    else:
        whose = f"{vendor}'s" if vendor else f"of an MPI that is not known ({line})"
        yield (failed if wanted else warning)(
            "mpirun",
            f"{path} is {whose}, and mpi4py loads {found.vendor}: N ranks would be N worlds of one",
            f"put the mpirun of {found.vendor} first on PATH, or tell mpi4py of the other MPI (LD_LIBRARY_PATH, "
            "MPI4PY_MPIABI)",
        )
    if machine.gpus()[0][:1].isdigit():
        done = subprocess.run(
            [sys.executable, "-c", CUDA_AWARE], capture_output=True, text=True, timeout=30, check=False
        )
        aware = done.stdout.strip() == "True"
        yield ok("MPI and GPUs", "it reads the memory of GPUs" if aware else "not CUDA-aware: use world.backend nccl")


def deepspeed(context: Context) -> Iterator[Finding]:
    """Look for locks that killed compilations left, for what is compiled, and for what compiles."""
    folders = extension_folders()
    for lock in sorted(lock for folder in folders for lock in folder.glob("**/lock")):
        yield _lock(lock)
    version = versions.package("deepspeed")()
    wanted = NEEDED.get(context.config.strategy.name) == "deepspeed"
    if version == versions.MISSING:
        yield (failed if wanted else ok)(
            "DeepSpeed", "not installed" + (', pip install "distloop[deepspeed]"' * wanted)
        )
        return
    built = sorted({file.stem for folder in folders for file in folder.glob("**/*.so")})
    tools = {name: shutil.which(name, path=_path()) for name in (os.environ.get("CXX", "c++").split()[0], "ninja")}
    missing = [name for name, path in tools.items() if path is None]
    told = f"{version}, operations compiled: {', '.join(built) or 'none yet'}"
    if missing and "cpu_adam" not in built:
        told += f"; {' and '.join(missing)} missing to compile more"
        needed = wanted and context.config.strategy.cpu_adam == "deepspeed"
        advice = "install a C++ compiler and ninja, or leave strategy.cpu_adam as it is"
        yield (failed if needed else warning)("DeepSpeed", told, advice)
    else:
        yield ok("DeepSpeed", told)


def _lock(lock: Path) -> Finding:
    from distloop.strategies.deepspeed.extension import check_lock

    try:
        check_lock(lock)
    except DistloopError as stale:
        return failed("DeepSpeed lock", str(stale).replace(": delete it", ""), f"rm {lock}")
    return ok("DeepSpeed lock", f"{lock} is held by a compilation that is under way")


def extension_folders() -> list[Path]:
    """Return where torch and distloop keep compiled operations: the user's choice, or the usual places."""
    if (given := os.environ.get("TORCH_EXTENSIONS_DIR")) is not None:
        return [Path(given)] if Path(given).is_dir() else []
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    usual = [cache / "torch_extensions", *native.cache().glob("torch-extensions-*")]
    return [folder for folder in usual if folder.is_dir()]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"
