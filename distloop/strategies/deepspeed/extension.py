"""DeepSpeed's operation for Adam on the CPU, which is compiled where it is used; what can go wrong is said before."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distloop import native
from distloop.errors import WorldError
from distloop.strategies.deepspeed import guest

OTHERWISE = "or set strategy.cpu_adam to torch"
SECONDS = 600.0  # a compilation takes one minute; on a busy machine more
COMPILE = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"


def cpu_adam(groups: list[dict[str, Any]], **constants: Any) -> torch.optim.Optimizer:
    """Return DeepSpeed's Adam for the CPU, compiled if need be.

    Raises:
        WorldError: it cannot be compiled here.
    """
    deepspeed = guest.load(torch.device("cpu"))
    with guest.silence():
        prepare()
        builder = deepspeed.ops.op_builder.CPUAdamBuilder()
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as failure:
            raise WorldError(
                f"strategy.cpu_adam: DeepSpeed's operation does not load ({first_error(str(failure))}): delete "
                f"{folder() / 'cpu_adam'}, {OTHERWISE}"
            ) from failure
        made: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **constants)
    return made


def prepare() -> None:
    """Compile the operation unless it is there; ranks of one host do it once, and nobody waits for a dead process.

    Raises:
        WorldError: there is no compiler, or it failed, or a lock that a killed process left is in the way.
    """
    place = folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(place)
    _find_tools()
    with _alone(place):
        check_lock(place / "cpu_adam" / "lock")
        if (place / "cpu_adam" / "cpu_adam.so").exists():
            return
        try:
            # In a process of its own: what the compiler prints is kept, and is not the user's to read.
            done = subprocess.run(
                [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            (place / "cpu_adam" / "lock").unlink(missing_ok=True)
            raise WorldError(
                f"strategy.cpu_adam: DeepSpeed's operation was not compiled within {SECONDS:g} s: {OTHERWISE[3:]}"
            ) from None
        if done.returncode:
            (place / "cpu_adam" / "lock").unlink(missing_ok=True)
            raise WorldError(
                f"strategy.cpu_adam: DeepSpeed's operation cannot be compiled ({first_error(done.stdout + done.stderr)}"
                f"): mend the compiler, {OTHERWISE}"
            )


def folder() -> Path:
    """Return where compiled operations are kept: the user's choice, or a folder per environment and processor."""
    if (given := os.environ.get("TORCH_EXTENSIONS_DIR")) is not None:
        return Path(given)
    deepspeed = guest.load(None)
    parts = [sys.prefix, platform.python_version(), torch.__version__, deepspeed.__version__, native._machine()]
    mark = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return native.cache() / f"torch-extensions-{mark}"


def check_lock(lock: Path) -> None:
    """Raise if ``lock`` was left by a process that is no more: torch would wait for it for ever, without a word.

    Raises:
        WorldError: it was.
    """
    if lock.exists() and not _held(lock):
        raise WorldError(
            f"{lock} was left by a compilation that was killed, and the next would wait for it for ever: delete it"
        )


def first_error(text: str) -> str:
    """Return the line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if re.search(r"\berror:|command not found|cannot find", line, re.I)), None)
    return said or (lines[-1] if lines else "no reason given")


def _find_tools() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise WorldError(
            f"strategy.cpu_adam: DeepSpeed's operation has to be compiled, and there is no C++ compiler ({compiler}) "
            f"here: install one, {OTHERWISE}"
        )
    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and shutil.which("ninja", path=str(beside)) is not None:
        os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{beside}"  # an environment not activated
    if shutil.which("ninja") is None:
        raise WorldError(
            "strategy.cpu_adam: DeepSpeed's operation has to be compiled, and there is no ninja here: pip install "
            f"ninja, {OTHERWISE}"
        )


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Let one process at a time into ``place``; the lock is the kernel's and dies with its owner."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (place / ".distloop.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _held(lock: Path) -> bool:
    """Return whether a living process has ``lock`` open, as who compiles does."""
    target = lock.resolve()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == target:
                return True
        except OSError:
            continue  # ended meanwhile, or another user's
    return False
