"""What must be the same on every rank before any of it is used: versions, code, and what decides what is computed."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import distloop
from distloop.settings import Resolved

# What a rank may have of its own.
OWN = {
    "log.directory",
    "log.progress",
    "log.tensorboard",
    "log.picture",
    "log.observers",
    "checkpoint.resume",
    "world.threads",
    "data.workers",
    "data.prefetch",
    "data.pin_memory",
    "data.worker_timeout",
}


def identity(resolved: Resolved, task: Any = None) -> dict[str, Any]:
    """Return this rank's versions, digests of its code, and its configuration.

    Args:
        resolved: the configuration.
        task: a task object, in place of the one that the configuration names.
    """
    config = resolved.config
    facts = software(nccl=config.world.backend == "nccl" or config.world.device != "cpu")
    for name, path in _code_of(config.task.name, task).items():
        facts[f"code of {name}"] = digest([path])
    return facts | {f"configuration {key}": value for key, value, _ in resolved.rows() if key not in OWN}


def software(*, nccl: bool) -> dict[str, Any]:
    """Return the versions of what any run uses, and a digest of our own code."""
    facts: dict[str, Any] = {
        "version of distloop": distloop.__version__,
        "version of Python": ".".join(map(str, sys.version_info[:2])),
        "version of torch": torch.__version__,
        "byte order": sys.byteorder,
    }
    if nccl and torch.cuda.is_available():
        facts["version of NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts | {"code of distloop": _own_code()}


@functools.cache
def _own_code() -> str:
    return digest(Path(distloop.__file__).parent.rglob("*.py"))


def digest(files: Iterable[Path]) -> str:
    """Return 12 hexadecimal digits that tell files' contents apart, wherever they lie."""
    found = hashlib.sha256()
    for path in sorted(files):
        try:
            content = path.read_bytes()
        except OSError:
            content = b""
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    return found.hexdigest()[:12]


def _code_of(name: str, task: Any) -> dict[str, Path]:
    """Return the files of the user's code that is known by name: the task's module, and the script that runs."""
    module = type(task).__module__ if task is not None else name.partition(":")[0] if ":" in name else ""
    found = {}
    if module and module != "__main__" and module.partition(".")[0] != "distloop":
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        if spec is not None and spec.has_location and spec.origin is not None:
            found[module] = Path(spec.origin)
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if task is not None and script is not None:
        found["the script"] = Path(script)
    return found
