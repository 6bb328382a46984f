"""C helpers, compiled when they are first needed and kept for the next time; what needs one says what to do without."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-std=c11", "-shared", "-fPIC"]


class UnavailableError(Exception):
    """A helper cannot be had here; the reason is one clause, to be put behind a colon."""


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """Return the library made of ``distloop/native/NAME.c``; calls into it release the interpreter.

    Raises:
        UnavailableError: not Linux, no compiler, or it failed.
    """
    if sys.platform != "linux":
        raise UnavailableError(f"it is written for Linux, this is {platform.system()}")
    source = Path(__file__).with_name(f"{name}.c")
    if not source.exists():
        raise UnavailableError(f"{source.name} is not among the installed files")
    compiler = shlex.split(os.environ.get("CC") or "cc")  # it may have arguments, or stand behind ccache
    mark = hashlib.sha256("\0".join([source.read_text(), *compiler, *FLAGS, _machine()]).encode()).hexdigest()[:16]
    library = cache() / f"{name}-{mark}.so"
    if not library.exists():
        _compile(compiler, source, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as failure:
        raise UnavailableError(f"{library.name} does not load ({failure})") from failure


def cache() -> Path:
    """Return the user's folder for what can be made again, which only they may write to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distloop"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return _fallback()


@functools.cache
def _fallback() -> Path:
    """Return a folder of this process alone: a home may be read-only, or missing."""
    import atexit

    folder = tempfile.mkdtemp(prefix="distloop-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    if shutil.which(compiler[0]) is None:
        raise UnavailableError(f"there is no C compiler ({compiler[0]}) here")
    # Several ranks may do this at once: each makes a file of its own, and renaming is atomic.
    handle, made = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*compiler, *FLAGS, "-o", made, str(source)], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
            raise UnavailableError(f"{compiler[0]} could not compile {source.name} ({reason})")
        Path(made).rename(library)
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise UnavailableError(f"{compiler[0]} could not compile {source.name} ({failure})") from failure
    finally:
        Path(made).unlink(missing_ok=True)


def _machine() -> str:
    """Return what code made for this processor depends on; a home may be shared by hosts that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return platform.machine() + "\n".join(told)
