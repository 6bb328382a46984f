"""What a bug report needs to know of this machine and of what is installed, without secrets; ``distloop env``.

Nothing here raises, and nothing imports torch: what cannot be read says why in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distloop.report import launch, machine, mpi, secrets, versions

UNKNOWN = "unknown"
SECTIONS: dict[str, dict[str, Callable[[], Any]]] = {
    "versions": {
        "distloop": versions.distloop,
        "Python": versions.python,
        "torch": versions.torch,
        "CUDA of torch": versions.cuda,
        "NCCL": versions.nccl,
        **{name: versions.package(name) for name in versions.PACKAGES},
    },
    "MPI": {"mpi4py": mpi.found, "mpirun": mpi.launcher},
    "machine": {
        "platform": machine.platform,
        "CPU": machine.cpu,
        "instructions": machine.instructions,
        "cores": machine.cores,
        "memory": machine.memory,
        "shared memory": machine.shared_memory,
        "GPUs": machine.gpus,
    },
    "launcher": {"found": launch.found, "why": launch.why},
    "variables": {},
}


def collect() -> dict[str, dict[str, Any]]:
    """Return the report: by section and name, text or what JSON holds."""
    report = {section: {name: tried(read) for name, read in entries.items()} for section, entries in SECTIONS.items()}
    variables = tried(secrets.variables)
    report["variables"] = variables if isinstance(variables, dict) else {"": variables}
    return report


def tried(read: Callable[[], Any]) -> Any:
    """Return what ``read`` finds, or why it does not."""
    try:
        return read()
    except Exception as failure:  # whatever is broken here is what the report is for
        return f"{UNKNOWN}: {secrets.blank(' '.join(f'{type(failure).__name__}: {failure}'.split())[:200])}"


def text(report: dict[str, dict[str, Any]]) -> str:
    """Return the report as lines."""
    lines: list[str] = []
    for section, entries in report.items():
        lines += ([""] if lines else []) + [section]
        width = max((len(name) for name in entries), default=0)
        for name, value in entries.items():
            told = value if isinstance(value, str) else ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"  {name:<{width}}  {told}")
        if not entries:
            lines.append("  none")
    return "\n".join(lines)
