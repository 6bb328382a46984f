"""Two ranks of the doctor's own on this host, so that collectives can be tried without a launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import IO

from distloop.build.device import visible_gpus
from distloop.doctor.findings import Context, Finding, failed

RANKS = 2
SECONDS = 90.0
# What launchers tell their ranks, and these ranks are not theirs: they would look for others, or for a store.
LAUNCHERS = (
    *("MASTER_", "TORCHELASTIC_", "PET_", "GROUP_", "ROLE_", "SLURM_", "OMPI_", "PMIX_", "PMI", "PRTE", "HYDRA_"),
    *("I_MPI_HYDRA_", "MPI_LOCAL", "MV2_", "MVP_"),
)


def examine(context: Context) -> list[Finding]:
    """Start the ranks, let them try things together, and return what they found."""
    command = [sys.executable, "-m", "distloop", "doctor", *_target(context), "--only", "ranks", "--json"]
    common = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    common |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
    outputs: list[IO[str]] = []
    processes = []
    try:
        for rank in range(RANKS):
            out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in _text)
            outputs += [out, err]
            own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=own, stdin=subprocess.DEVNULL))
        deadline = time.monotonic() + SECONDS
        for process in processes:
            process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return [failed("two ranks", f"two ranks of the doctor's own did not end within {SECONDS:g} s")]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        texts = [_text(file) for file in outputs]
    try:
        found = [Finding.from_json(told) for told in json.loads(texts[0])["findings"]]
        return [finding for finding in found if finding.check != "launcher"]
    except (ValueError, KeyError, TypeError):
        reason = next((line for text in texts[1::2] for line in text.strip().splitlines()[-1:]), "they said nothing")
        return [failed("two ranks", f"two ranks of the doctor's own failed: {reason}")]


def _target(context: Context) -> list[str]:
    """Return the target and its settings, but for what asks for a launcher, or for a GPU for each rank."""
    forced = {"world.transport": "torch"}
    if visible_gpus(context.config.world.device) < RANKS:
        forced |= {"world.device": "cpu", "world.backend": "auto"}
    kept, waiting = list(context.target[:1]), list(context.target[1:])
    while waiting:
        option = waiting.pop(0)
        given = [option] if "=" in option else [option, waiting.pop(0)]
        if option.partition("=")[0].removeprefix("--").replace("-", "_") not in forced:
            kept += given
    return [*kept, *(f"--{name}={value}" for name, value in forced.items())]


def _text(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
