"""What machine this is: processor, memory, GPUs, and how much of them this process may use."""

from __future__ import annotations

import os
import platform as _platform
import re
import shutil
import subprocess
from pathlib import Path

from distloop import cores as _cores
from distloop.memory_limit import memory_bound
from distloop.world import World

PROC, DEV = Path("/proc"), Path("/dev")
# What torch has kernels for, the best first: ATen's capability, and the flags it takes.
CAPABILITIES = (
    ("AVX512", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}),
    ("AVX2", {"avx2", "fma"}),
    ("SVE256", {"sve", "svebitperm"}),
    ("NEON", {"asimd"}),
)
EXTRAS = ("avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16", "bf16", "f16c")
QUERY = "index,name,memory.total,driver_version,compute_cap"


def platform() -> str:
    told, libc = _platform.platform(), "".join(_platform.libc_ver())
    return told if libc in told else f"{told} {libc}"


def cpu(proc: Path = PROC) -> str:
    """Return the processor's model and how many there are."""
    told = (proc / "cpuinfo").read_text()
    names = re.findall(r"^(?:model name|CPU part)\s*:\s*(.*)$", told, re.MULTILINE)
    return f"{names[0] if names else _platform.machine()}, {os.cpu_count()} processors"


def instructions(proc: Path = PROC) -> str:
    """Return for which of its kernels torch will find this processor good enough."""
    told = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", (proc / "cpuinfo").read_text(), re.MULTILINE)
    flags = set(told[1].split()) if told else set()
    best = next((name for name, needed in CAPABILITIES if needed <= flags), "no vector kernels of torch's")
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    return ", ".join([best, *[e for e in EXTRAS if e in flags], *([f"ATEN_CPU_CAPABILITY={asked}"] if asked else [])])


def cores() -> str:
    """Return how many cores this process may use, and what limits them."""
    found = _cores.Cores.of_this_process(World())
    processors = sum(len(core) for core in found.cores)
    quota = "no quota" if found.quota is None else f"quota of the control group: the time of {found.quota:g}"
    return f"{found.count}: affinity to {len(found.cores)} cores ({processors} processors), {quota}"


def memory(proc: Path = PROC) -> str:
    """Return memory, what of it is free, swap, and the limit of this job."""
    rows = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
    size = {name: int(value.split()[0]) * 1024 for name, value in rows.items()}
    limit = memory_bound()
    parts = [f"{in_words(size['MemTotal'])}", f"{in_words(size['MemAvailable'])} available"]
    parts += [f"swap {in_words(size.get('SwapTotal', 0))}"]
    return ", ".join([*parts, "no limit" if limit is None else f"limit {in_words(limit)}"])


def shared_memory(dev: Path = DEV) -> str:
    usage = shutil.disk_usage(dev / "shm")
    return f"{in_words(usage.total)} in {dev / 'shm'}, {in_words(usage.free)} free"


def gpus(seconds: float = 10.0) -> list[str]:
    """Return the GPUs as the driver names them."""
    if shutil.which("nvidia-smi") is None:
        return ["none: there is no nvidia-smi here"]
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        reason = ((done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"])[0]
        return [f"unknown: nvidia-smi says {reason}"]
    found = []
    for line in done.stdout.strip().splitlines():
        index, name, size, driver, capability = (part.strip() for part in line.split(","))
        found.append(f"{index}: {name}, {size}, compute capability {capability}, driver {driver}")
    return found or ["none"]


def in_words(size: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
