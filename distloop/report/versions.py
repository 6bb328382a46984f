"""Which versions are installed: read from their metadata, because importing some of them takes seconds."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from distloop import __version__

PACKAGE = Path(__file__).resolve().parent.parent
PACKAGES = (
    "numpy",
    "pydantic",
    "click",
    "rich",
    "ruamel.yaml",
    "safetensors",
    "mpi4py",
    "deepspeed",
    "ninja",
    "scikit-learn",
    "matplotlib",
    "tensorboardX",
    "torchmetrics",
    "gymnasium",
)
MISSING = "not installed"
SECONDS = 5.0  # that another program may take to say its version


def distloop() -> str:
    """Return our version, and the commit if this is a checkout."""
    commit = checkout()
    return __version__ if commit is None else f"{__version__}, {commit}"


def checkout(package: Path = PACKAGE) -> str | None:
    """Return the git commit that the package is of, and whether files have been changed; None if it is installed."""
    if not (package.parent / ".git").exists():
        return None
    head = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"commit {head}{' with changes' if changed else ''}"


def _git(package: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["git failed"])[0])
    return done.stdout.strip()


def python() -> str:
    return f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})"


def package(name: str) -> Callable[[], str]:
    """Return what finds the version of a package."""

    def find() -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return MISSING

    return find


def torch() -> str:
    """Return torch's version, with the commit it was built from."""
    version = package("torch")()
    commit = torch_build().get("git_version")
    return f"{version}, built from {commit}" if commit else version


def cuda() -> str:
    """Return the CUDA, or ROCm, that torch was built for."""
    if package("torch")() == MISSING:
        return "no torch"
    build = torch_build()
    hip = build.get("hip")
    return f"ROCm {hip}" if hip else build.get("cuda") or "none: this torch is for CPUs"


def nccl() -> str:
    """Return the version of NCCL that is installed with torch."""
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"] or ""
        if name.startswith("nvidia-nccl"):
            return f"{found.version} ({name})"
    return "none" if cuda().startswith("no") else "in torch itself"


def torch_build() -> dict[str, str | None]:
    """Return what torch says of its build, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return {}
    values: dict[str, str | None] = {}
    for node in ast.parse((Path(found.origin).parent / "version.py").read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            values[target.id] = value.value if isinstance(value.value, str) else None
    return values
