"""A Slurm of this machine's own, for tests: munged, slurmctld and a slurmd for each of N nodes, all on this host."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.ranks import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo", "munge")
KILL_WAIT = 15  # seconds between SIGTERM and SIGKILL
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2,bf_interval=2
JobRequeue=1
ReturnToService=2
KillWait={kill_wait}
SwitchType=switch/none
TmpFS={folder}/tmp-%n
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
"""


def missing() -> str | None:
    """Return why it cannot be had here, if so."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    folders = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    gone = [name for name in (*DAEMONS, *CLIENTS) if shutil.which(name, path=folders) is None]
    return f"not installed: {', '.join(gone)} (Debian's slurm-wlm and munge have them)" if gone else None


class Slurm:
    """While entered, a cluster of so many nodes called node1, node2 and so on."""

    def __init__(self, nodes: int, cpus: int = 4):
        self.nodes, self._cpus = nodes, cpus
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds a socket
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        if len(self._daemons) > 1:
            self.call("scancel", "--user=root", "--quiet", check=False)
            self._until(lambda: self.call("squeue", "--noheader", check=False) == "", KILL_WAIT + 10, "empty queue")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *command: str, check: bool = True, folder: Path | None = None, **variables: str) -> str:
        """Run a command of Slurm; return what it says."""
        ended = subprocess.run(
            command,
            cwd=folder or self.folder,
            env=os.environ | self.environment | variables,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert ended.returncode == 0 or not check, f"{command}: {ended.stderr}"
        return ended.stdout.strip()

    def submit(self, *arguments: str, folder: Path, **variables: str) -> str:
        """Return the number of a new job."""
        return self.call("sbatch", "--parsable", *arguments, folder=folder, **variables)

    def about(self, job: str, key: str) -> str:
        """Return one of the things that are known of a job, such as JobState, ExitCode, Restarts."""
        found = re.search(rf"\b{key}=(\S+)", self.call("scontrol", "show", "job", "--oneliner", job))
        assert found is not None, f"{key} of job {job}"
        return found[1]

    def wait(self, job: str, state: str, seconds: float) -> None:
        """Wait until a job is in a state."""
        self._until(lambda: self.about(job, "JobState") == state, seconds, f"{state} of job {job}")

    def _start(self) -> None:
        (self.folder / "munge").mkdir()
        (self.folder / "state").mkdir()
        for folder in (self.folder, self.folder / "munge"):
            folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        where = f"--socket={self.folder}/munge/socket"
        self._daemon("munged", "--foreground", where)
        self._until(lambda: bool(self.call("munge", "--no-input", where, check=False)), 10, "munged")
        names = [f"node{number}" for number in range(1, self.nodes + 1)]
        host, port = socket.gethostname().partition(".")[0], free_port()
        text = CONFIGURATION.format(host=host, port=port, folder=self.folder, kill_wait=KILL_WAIT)
        for name in names:
            text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={self._cpus}"
            text += " RealMemory=1000\n"
            (self.folder / f"spool-{name}").mkdir()
            (self.folder / f"tmp-{name}").mkdir()
        text += "PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self._daemon("slurmctld", "-D", "-i")
        self._until(lambda: "UP" in self.call("scontrol", "ping", check=False), 20, "slurmctld")
        for name in names:
            self._daemon("slurmd", "-D", "-N", name)
        self._until(lambda: self._idle() == self.nodes, 30, "all nodes")

    def _idle(self) -> int:
        return self.call("sinfo", "--noheader", "--Node", "--format=%T", check=False).split().count("idle")

    def _daemon(self, name: str, *options: str) -> None:
        path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert path is not None
        if name == "munged":
            own = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            options += tuple(f"--{option}={self.folder}/munge/{file}" for option, file in own.items())
        self._daemons.append(
            subprocess.Popen(
                [path, *options],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def _until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = self.folder / "slurmctld.log"
                tail = log.read_text()[-2000:] if log.exists() else ""
                raise AssertionError(f"{what}: not within {seconds} s\n{tail}")
            time.sleep(0.2)
