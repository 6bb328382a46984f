"""Where the ranks of a run meet: a pure function of the environment variables, as :mod:`distloop.world` is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distloop.errors import WorldError
from distloop.world import World

# What tells one job from another, in the order of World's launchers: a job that meets another by mistake finds out.
JOBS = {
    "torchrun": ("TORCHELASTIC_RUN_ID",),
    "Open MPI": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    "Intel MPI": ("I_MPI_HYDRA_UUID",),
}
SLURM_PORTS = (15000, 30000)  # below those that systems hand out by themselves
TRIED = 8  # ports that ranks of a Slurm step may meet at, in case one is taken


@dataclass(frozen=True)
class Master:
    """Where rank 0 answers the others.

    Attributes:
        address: host name or address of rank 0's host.
        ports: where it answers, at the first that is free; one, if somebody chose it.
        job: what tells this job from others; "" where nothing does.
        attempt: which start of the job this is, where the launcher starts it again after a failure.
        other_host: whether the launcher says that rank 0 is on another host than this process.
    """

    address: str
    ports: tuple[int, ...]
    job: str = ""
    attempt: int = 0
    other_host: bool = False

    @property
    def where(self) -> str:
        """Address and port as users write them."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.ports[0]}" if len(self.ports) == 1 else f"{host}, ports {', '.join(map(str, self.ports))}"

    @classmethod
    def from_environment(cls, world: World, environment: Mapping[str, str] | None = None) -> Master:
        """Read ``MASTER_ADDR`` and ``MASTER_PORT``; under Slurm, what is not set follows from the job.

        Raises:
            WorldError: nothing says where rank 0 is, or the port is none.
        """
        env = os.environ if environment is None else environment
        address, port = env.get("MASTER_ADDR", "").strip(), env.get("MASTER_PORT", "").strip()
        if address.startswith("[") and address.endswith("]"):
            address = address[1:-1]
        in_slurm = world.launcher == "Slurm"
        if in_slurm and not address:
            address = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
        ports = _slurm_ports(env) if in_slurm and not port else ()
        missing = [name for name, there in (("MASTER_ADDR", address), ("MASTER_PORT", port or ports)) if not there]
        if missing:
            raise WorldError(
                f"{world.launcher} started {world.size} ranks but {' and '.join(missing)} is not set: "
                "start with torchrun, or export the address and a free port of rank 0's host",
                everywhere=True,
            )
        restart = env.get("TORCHELASTIC_RESTART_COUNT", "")
        attempt = int(restart) if restart.isdecimal() else 0
        node = env.get("SLURM_NODEID" if in_slurm else "GROUP_RANK", "0")
        other = world.launcher in ("torchrun", "Slurm") and node != "0"
        return cls(address, ports or (_port(port),), job_of(world, env), attempt, other)


def job_of(world: World, env: Mapping[str, str]) -> str:
    """Return the name of the job that these ranks are of, as far as the launcher gives one."""
    if "SLURM_JOB_ID" in env and world.launcher in ("Slurm", "MPICH"):
        step, restart = env.get("SLURM_STEP_ID", "batch"), env.get("SLURM_RESTART_COUNT", "0")
        return f"Slurm {env['SLURM_JOB_ID']}.{step}, start {restart}"
    named = next((env[name] for name in JOBS.get(world.launcher, ()) if env.get(name)), "")
    return f"{world.launcher} {named}" if named not in ("", "none") else ""


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm list such as ``gpu[07-09,12]-ib,login``, on which a step's rank 0 runs."""
    found = re.match(r"[^,\[]*(\[[^\]]*\][^,\[]*)*", nodes)
    text = found[0] if found else ""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", text)


def _slurm_ports(env: Mapping[str, str]) -> tuple[int, ...]:
    """Return the ports that a Slurm step may meet at: the same on all its ranks, others for other steps, likely."""
    job, step = (
        int(text) if (text := env.get(name, "")).isdecimal() else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")
    )
    low, high = SLURM_PORTS
    return tuple(low + (job * 31 + step * 7 + i * 1009) % (high - low) for i in range(TRIED))


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text, re.ASCII) or not 1 <= int(text) <= 65535:
        raise WorldError(
            f"environment variable MASTER_PORT={text[:60]!r} is no port: it must be a number from 1 to 65535",
            everywhere=True,
        )
    return int(text)
