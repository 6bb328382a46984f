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
from contextlib import suppress
from pathlib import Path

FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-std=c11", "-shared", "-fPIC"]
# What may be assumed of the processor of a machine that is not yet known, and the flags in /proc/cpuinfo that tell it.
ELSEWHERE = {
    "x86_64": ("-march=x86-64-v3", {"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}),
    "aarch64": ("-march=armv8-a", set[str]()),
}


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
    made = beforehand(source)
    if made.exists() and _runs_here():
        with suppress(OSError):  # of another C library: compile
            return ctypes.CDLL(str(made))
    compiler = shlex.split(os.environ.get("CC") or "cc")  # it may have arguments, or stand behind ccache
    mark = hashlib.sha256("\0".join([source.read_text(), *compiler, *FLAGS, _machine()]).encode()).hexdigest()[:16]
    library = cache() / f"{name}-{mark}.so"
    if not library.exists():
        _compile(compiler, source, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as failure:
        raise UnavailableError(f"{library.name} does not load ({failure})") from failure


def beforehand(source: Path) -> Path:
    """Return where ``python -m distloop.native`` puts the library of a source: images need no compiler then."""
    mark = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    return source.parent / "made" / f"{source.stem}-{platform.machine()}-{mark}.so"


def make_beforehand() -> list[Path]:
    """Compile every helper for machines like this one, not for this one alone; return the libraries.

    Raises:
        UnavailableError: no compiler, or it failed.
    """
    if platform.machine() not in ELSEWHERE:
        raise UnavailableError(f"what all processors of {platform.machine()} have is not known")
    libraries = []
    for source in sorted(Path(__file__).parent.glob("*.c")):
        library = beforehand(source)
        library.parent.mkdir(exist_ok=True)
        flags = [ELSEWHERE[platform.machine()][0] if flag == "-march=native" else flag for flag in FLAGS]
        _compile(shlex.split(os.environ.get("CC") or "cc"), source, library, flags)
        library.chmod(0o644)  # for whoever runs it
        libraries.append(library)
    return libraries


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


def _compile(compiler: list[str], source: Path, library: Path, flags: list[str] | None = None) -> None:
    if shutil.which(compiler[0]) is None:
        raise UnavailableError(f"there is no C compiler ({compiler[0]}) here")
    # Several ranks may do this at once: each makes a file of its own, and renaming is atomic.
    handle, made = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*compiler, *(flags or FLAGS), "-o", made, str(source)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
            raise UnavailableError(f"{compiler[0]} could not compile {source.name} ({reason})")
        Path(made).rename(library)
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise UnavailableError(f"{compiler[0]} could not compile {source.name} ({failure})") from failure
    finally:
        Path(made).unlink(missing_ok=True)


def _runs_here() -> bool:
    """Return whether this processor has what libraries made beforehand take for granted."""
    told = next((line for line in _processor() if line.startswith("flags")), "")
    needed = ELSEWHERE.get(platform.machine(), ("", {"known"}))[1]
    return needed <= set(told.split())


def _machine() -> str:
    """Return what code made for this processor depends on; a home may be shared by hosts that differ."""
    return platform.machine() + "\n".join(_processor())


def _processor() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
