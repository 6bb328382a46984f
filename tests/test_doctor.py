"""``distloop doctor``: what it says of a host in order, and of faults that are planted."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distloop import collectives
from distloop.build.device import SHOWN
from distloop.config import Config
from distloop.doctor import (
    Context,
    Finding,
    Level,
    limits,
    links,
    network,
    own_ranks,
    show,
    software,
    storage,
    together,
)
from distloop.doctor.findings import bounded, failed, ok, warning
from distloop.errors import WorldError
from distloop.transports import Transport
from distloop.world import World
from tests.ranks import free_port, in_threads, run_command

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ALONE = Context(World(), Config())
TWO_HOSTS = Context(World(0, 2, 0, 1, "torchrun"), Config())


Told = tuple[int, dict[str, dict[str, str]], str]


def doctor(*arguments: str, folder: Path, **more: Any) -> Told:
    """Run it as a process of its own; return its exit code, its findings by check, and what it said to stderr."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "distloop", "doctor", *arguments, "--json"],
        capture_output=True, text=True, timeout=110, check=False, cwd=folder, env=os.environ | variables, **more,
    )  # fmt: skip
    return told(done.returncode, done.stdout, done.stderr)


def forked_doctor(*arguments: str, folder: Path, **variables: str) -> Told:
    """Return the same, seconds sooner, of a process that is forked where torch is imported."""
    (end,) = run_command("doctor", *arguments, "--json", folder=folder, seconds=110, PYTHONPATH=str(ROOT), **variables)
    return told(end.code, end.out, end.err)


def told(code: int, out: str, err: str) -> Told:
    findings = json.loads(out)["findings"] if out else []
    return code, {finding["check"]: finding for finding in findings}, err


def only(found: Finding | Iterator[Finding]) -> Finding:
    (finding,) = [found] if isinstance(found, Finding) else list(found)
    return finding


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_alone_it_tries_two_ranks_of_its_own(tmp_path: Path) -> None:
    code, found, err = doctor("--world.timeout", "30", folder=tmp_path)
    assert code == 0, (found, err)
    for check in ("launcher", "cores", "port", "run directory", "rendezvous", "same everywhere", "clocks", "links"):
        assert found[check]["level"] in ("ok", "warning"), found[check]
    for way in ("torch", "sockets"):
        assert (
            found[f"sums over {way}"]["found"] == f"{len(collectives.ALL_REDUCE) + 2} collectives are right on 2 ranks"
        )


def test_as_ranks_of_a_launcher(tmp_path: Path) -> None:
    ends = run_command("doctor", "--only", "network", "--only", "ranks", folder=tmp_path, ranks=2, seconds=90)
    assert [end.code for end in ends] == [0, 0], ends[0].out + ends[1].err
    assert ends[1].out == "", "rank 0 alone tells"
    lines = ends[0].out.splitlines()
    assert lines[0].startswith("ok       launcher                torchrun: rank 0 of 2")
    assert any(line.startswith("ok       links                   slowest pair: ranks 0 and 1, ") for line in lines)
    assert lines[-1].endswith(" 0 failed")


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "distloop", "doctor", "--only", "ranks", "--json"],
        capture_output=True, text=True, timeout=90, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not json.loads(done.stdout)["failed"]


def test_one_rank_of_a_launcher_tries_two_of_its_own(tmp_path: Path) -> None:
    """They are not to look for the store that the launcher keeps, nor for its mpirun."""
    inherited = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    inherited |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "a", "MASTER_PORT": str(free_port())}
    arguments = ("--only", "ranks", "--world.transport", "mpi", "--world.timeout", "30")
    code, found, err = forked_doctor(*arguments, folder=tmp_path, MASTER_ADDR="127.0.0.1", **inherited)
    assert code == 0, (found, err)
    assert found["rendezvous"]["found"].startswith("2 ranks on 1 host met")


def test_a_port_in_use_is_named_with_its_owner(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        begun = time.monotonic()
        ends = run_command(
            "doctor", "--only", "network", "--only", "ranks", folder=tmp_path, ranks=2, seconds=60,
            MASTER_PORT=str(number), TORCHELASTIC_USE_AGENT_STORE="False",
        )  # fmt: skip
    assert [end.code for end in ends] == [3, 3]
    assert time.monotonic() - begun < 50
    told = [line for line in ends[0].out.splitlines() if line.startswith("failed   port")]
    assert told and f"MASTER_PORT={number} is taken by process {os.getpid()} (" in told[0]
    assert "failed   rendezvous" in ends[0].out and "Traceback" not in ends[0].err + ends[1].err


def test_few_open_files(tmp_path: Path) -> None:
    code, found, _ = doctor(
        "--only", "host", folder=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    )
    assert code == 3
    assert found["open files"]["level"] == "failed" and "ulimit -n" in found["open files"]["advice"]


def test_stale_locks_of_deepspeed(tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    extensions = str(tmp_path / "extensions")
    code, found, _ = forked_doctor("--only", "software", folder=tmp_path, TORCH_EXTENSIONS_DIR=extensions)
    assert code == 3
    assert found["DeepSpeed lock"]["level"] == "failed" and found["DeepSpeed lock"]["advice"] == f"rm {lock}"
    assert str(lock) in found["DeepSpeed lock"]["found"]
    assert "GPUs" in found, "the others are tried all the same"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "hots"], "command line --only: there is no area 'hots' (did you mean 'host'?)"),
        (["digit"], "command line: 'digit' is neither a file nor a supplied task (did you mean 'digits'?)"),
        (["--world.transprot", "mpi"], "world.transprot"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    code, _, err = forked_doctor(*arguments, folder=tmp_path)
    assert code == 2 and sentence in err and len(err.splitlines()) == 1


def test_what_a_launcher_says_may_be_wrong(tmp_path: Path) -> None:
    code, found, _ = forked_doctor(folder=tmp_path, RANK="5", WORLD_SIZE="2")
    assert code == 3
    assert found["launcher"]["level"] == "failed" and "RANK=5" in found["launcher"]["found"]
    assert "open files" in found and "rendezvous" not in found


# -- checks of a host ------------------------------------------------------------------------------------------------


def test_names_that_do_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(name: str) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(network, "addresses", nobody)
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert only(network.host_name(ALONE)).level == Level.WARNING
    monkeypatch.setenv("MASTER_ADDR", "no-such-master")
    own, master = network.host_name(TWO_HOSTS)
    assert own.level == master.level == Level.FAILED
    assert "'no-such-host' does not resolve" in own.found and "/etc/hosts" in own.advice
    assert "'no-such-master' does not resolve" in master.found


def test_loopback_is_for_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "addresses", lambda name: ["127.0.1.1"])
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    own, master = network.host_name(TWO_HOSTS)
    assert own.level == Level.WARNING and master.level == Level.OK, "Debian has it so, and rank 0 is here"
    own, master = network.host_name(Context(World(1, 2, 0, 1, "torchrun"), Config()))
    assert own.level == Level.WARNING and master.level == Level.FAILED
    own, master = network.host_name(Context(World(0, 2, 0, 2, "torchrun"), Config()))
    assert own.level == master.level == Level.OK


def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *what, **more: time.sleep(8) or [])
    monkeypatch.setattr(network, "LOOKUP", 0.1)
    monkeypatch.setenv("MASTER_ADDR", "slow")
    begun = time.monotonic()
    own, master = network.host_name(TWO_HOSTS)
    assert own.level == master.level == network.interfaces(TWO_HOSTS).level == Level.FAILED
    assert "'slow' does not resolve (no answer within 0.1 s)" in master.found
    assert time.monotonic() - begun < 6


def test_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    found = network.interfaces(ALONE)
    assert found.level == Level.OK and "to 127.0.0.1 by lo (127.0.0.1)" in found.found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    found = network.interfaces(ALONE)
    assert found.level == Level.FAILED and "'eth99'" in found.found and "lo" in found.advice


def test_who_listens(tmp_path: Path) -> None:
    assert network.listener(free_port()) is None
    with socket.create_server(("", 0), family=socket.AF_INET6) as server:
        told = network.listener(server.getsockname()[1])
    assert told is not None and told.startswith(f"process {os.getpid()} (")
    (tmp_path / "net").mkdir()
    row = "  0: 0100007F:733C 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 4242 1 x"
    (tmp_path / "net" / "tcp").write_text(f"head\n{row}\n")
    assert network.listener(29500, tmp_path) == "a process of another user, or outside this container"


def test_the_launchers_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        monkeypatch.setenv("MASTER_ADDR", "h0")
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        assert network.port(TWO_HOSTS).level == Level.OK
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
        assert network.port(TWO_HOSTS).level == Level.FAILED
    monkeypatch.setenv("MASTER_PORT", "abc")
    found = network.port(TWO_HOSTS)
    assert found.level == Level.FAILED and "MASTER_PORT='abc' is no port" in found.found


def test_where_ranks_of_other_launchers_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    by_mpi = Context(World(0, 2, 0, 2, "Open MPI"), Config())
    assert network.port(by_mpi) == ok("port", "none is needed: ranks meet by MPI")
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "a[07-09]"}.items():
        monkeypatch.setenv(name, value)
    step = Context(World(0, 2, 0, 1, "Slurm"), Config())
    monkeypatch.setattr(network, "listener", lambda number: "process 1 (x)" if number == 15031 else None)
    monkeypatch.setattr(network, "addresses", lambda name: ["10.0.0.7"] if name == "a07" else ["10.0.0.1"])
    assert network.port(step) == ok("port", "16040 is free"), "one of those that it tries"
    assert list(network.host_name(step))[1] == ok("master", "a07 is 10.0.0.7")


def test_huge_pages(tmp_path: Path) -> None:
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    assert limits.huge_pages(ALONE, file).level == Level.OK
    file.write_text("always madvise [never]\n")
    assert limits.huge_pages(ALONE, file).level == Level.WARNING


def test_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (400, 4096))
    found = [only(limits.open_files(ALONE)), only(limits.processes(ALONE)), only(limits.locked_memory(ALONE))]
    assert [one.level for one in found] == [Level.WARNING, Level.WARNING, Level.OK]
    monkeypatch.setattr(limits, "NETWORKS", tmp_path)
    assert limits.locked_memory(ALONE).level == Level.WARNING
    many = Context(World(0, 64, 0, 2, "torchrun"), Config())
    assert limits.open_files(many).level == Level.FAILED


def test_processes_of_a_group(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "pids.max").write_text("max\n")
    (tmp_path / "a" / "pids.max").write_text("77\n")
    assert limits._most_of_groups(tmp_path / "cgroup", tmp_path) == 77
    (tmp_path / "a" / "b" / "pids.max").write_text("500\n")
    assert limits._most_of_groups(tmp_path / "cgroup", tmp_path) == 77, "all of them hold"
    (tmp_path / "cgroup").write_text("5:devices,pids:/c\n0::/x\n")
    (tmp_path / "pids" / "c").mkdir(parents=True)
    (tmp_path / "pids" / "c" / "pids.max").write_text("33\n")
    assert limits._most_of_groups(tmp_path / "cgroup", tmp_path) == 33
    assert limits._most_of_groups(tmp_path / "none", tmp_path) is None


def test_ranks_and_cores() -> None:
    crowd = Context(World(0, 10**6, 0, 10**6, "torchrun"), Config())
    assert limits.cores(crowd).level == Level.WARNING
    assert limits.cores(ALONE).level == Level.OK


def test_file_systems(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:5 / /scratch rw shared:1 - lustre x rw\n"
        "3 1 0:6 / /my\\040runs rw - tmpfs tmpfs rw\n"
    )
    assert storage.file_system(Path("/scratch/me"), mounts) == "lustre"
    assert storage.file_system(Path("/scratchy"), mounts) == "ext4"
    assert storage.file_system(Path("/my runs/x"), mounts) == "tmpfs"


@pytest.mark.parametrize(
    ("kind", "context", "level"),
    [
        ("ext4", ALONE, Level.OK),
        ("tmpfs", ALONE, Level.WARNING),
        ("ext4", TWO_HOSTS, Level.WARNING),
        ("nfs4", TWO_HOSTS, Level.OK),
    ],
)
def test_run_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, context: Context, level: Level
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "file_system", lambda place: kind)
    monkeypatch.setattr(storage, "SLOW", 10.0)
    found = only(storage.disk(context))
    assert found.level == level and str(tmp_path / "runs") in found.found
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_run_directories_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(place: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_write", full)
    found = only(storage.disk(ALONE))
    assert found.level == Level.FAILED and "No space left" in found.found and "--log.directory" in found.advice


def test_small_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LEAST_SHARED", 1 << 62)
    first, second = storage.shared_memory(ALONE)
    assert first.level == Level.WARNING and "--shm-size" in first.advice
    assert second.check == "ranks' memory"


def test_foreign_mpirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distloop.report import mpi

    script(tmp_path / "mpirun", "echo 'HYDRA build details:'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(mpi, "library", lambda: mpi.Library("Open MPI", "5.0.1", "Open MPI v5.0.1"))
    *_, found = software.message_passing(ALONE)
    assert found.level == Level.WARNING
    assert (
        f"{tmp_path / 'mpirun'} is MPICH's, and mpi4py loads Open MPI: N ranks would be N worlds of one" in found.found
    )
    wanted = Context(World(), Config(world={"transport": "mpi"}))  # type: ignore[arg-type]
    *_, found = software.message_passing(wanted)
    assert found.level == Level.FAILED and "PATH" in found.advice
    monkeypatch.setattr(mpi, "library", lambda: "mpi4py is not installed")
    assert only(software.message_passing(wanted)).level == Level.FAILED
    assert only(software.message_passing(ALONE)).level == Level.OK


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from distloop.report import machine

    assert only(software.gpus(ALONE)).level == Level.OK
    wanted = Context(World(), Config(world={"device": "cuda"}))  # type: ignore[arg-type]
    assert only(software.gpus(wanted)).level == Level.FAILED
    monkeypatch.setattr(machine, "gpus", lambda: ["0: NVIDIA H100"])
    found = only(software.gpus(ALONE))
    assert found.level == Level.WARNING and "torch sees none" in found.found


@pytest.mark.parametrize(
    ("gpus", "variables", "world", "level"),
    [
        (2, {}, World(0, 2, 0, 2, "torchrun"), Level.OK),
        (1, {}, World(0, 2, 0, 2, "torchrun"), Level.FAILED),
        (1, {"CUDA_VISIBLE_DEVICES": "0"}, World(0, 2, 0, 2, "Slurm"), Level.OK),  # srun --gpus-per-task=1
        (2, {"CUDA_VISIBLE_DEVICES": "0,1"}, World(0, 4, 0, 4, "Slurm"), Level.FAILED),
        (1, {}, World(0, 2, 0, 2, "MPICH", host_known=False), Level.OK),
    ],
)
def test_gpus_for_ranks(
    monkeypatch: pytest.MonkeyPatch, gpus: int, variables: dict[str, str], world: World, level: Level
) -> None:
    for name in SHOWN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 1))
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    context = Context(world, Config())
    assert next(software.gpus(context)).level == level
    places = [replace(context, world=replace(world, local_rank=rank)) for rank in range(world.local_size)]
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if level == Level.OK:
        indices = [together.device_of(place).index for place in places]
        assert indices == (list(range(world.local_size)) if gpus > 1 else [0] * world.local_size)
    else:
        with pytest.raises(WorldError, match="has no GPU of its own"):
            together.device_of(places[-1])


# -- checks between ranks --------------------------------------------------------------------------------------------


def test_collectives_that_are_right() -> None:
    for found in in_threads(3, lambda way: list(together.sums(way, "threads", way, CPU))):
        assert only(iter(found)) == ok(
            "sums over threads", f"{len(collectives.ALL_REDUCE) + 2} collectives are right on 3 ranks"
        )


def test_a_collective_that_sums_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(way: Transport, tensor: torch.Tensor) -> None:
        collectives.naive.all_reduce(way, tensor)
        if way.rank == 1 and len(tensor) > 2000:
            tensor[1500] += 1

    def broken(way: Transport, tensor: torch.Tensor) -> None:
        raise ValueError("no such thing")

    monkeypatch.setitem(collectives.ALL_REDUCE, "ring", wrong)
    monkeypatch.setitem(collectives.ALL_REDUCE, "direct", broken)
    for found in in_threads(2, lambda way: list(together.sums(way, "threads", way, CPU))):
        finding = only(iter(found))
        assert finding.level == Level.FAILED
        assert "all-reduce ring on rank 1: element 1500 of 300007 is" in finding.found
        assert "all-reduce direct on rank 0: ValueError: no such thing" in finding.found
        assert "naive" not in finding.found


def test_differences_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(way: Transport) -> Finding:
        lr = 0.1 if threading.current_thread().name == "rank 2" else 0.2
        return together.same(way, Context(World(), Config(optimizer={"lr": lr})))  # type: ignore[arg-type]

    for found in in_threads(3, compare):
        assert found.level == Level.FAILED and found.found == "optimizer.lr is 0.2 on rank 0 and 0.1 on rank 2"
    monkeypatch.setattr(together, "software", lambda nccl: {"code": threading.current_thread().name})
    for found in in_threads(2, lambda way: together.same(way, ALONE)):
        assert found.found == 'code is "rank 0" on rank 0 and "rank 1" on rank 1'


def test_what_a_rank_may_have_of_its_own_is_not_compared() -> None:
    def compare(way: Transport) -> Finding:
        folder = threading.current_thread().name
        return together.same(way, Context(World(), Config(log={"directory": folder})))  # type: ignore[arg-type]

    assert [found.level for found in in_threads(2, compare)] == [Level.OK] * 2


@pytest.mark.parametrize(
    ("settings", "variables", "expected"),
    [
        ({}, {}, ("mpi", "gloo")),
        ({"backend": "nccl"}, {}, ("torch", "gloo")),
        ({"transport": "torch"}, {}, ("torch", "gloo")),
        ({}, {"MASTER_ADDR": "h0"}, ("torch", "gloo")),
        ({"transport": "mpi"}, {"MASTER_ADDR": "h0"}, ("mpi", "gloo")),
    ],
)
def test_ranks_meet_as_those_of_a_run(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], variables: dict[str, str], expected: tuple[str, str]
) -> None:
    from distloop.transports import join

    asked = []

    def ask(world: World, name: str, *, backend: str, **more: Any) -> tuple[Any, list[str]]:
        asked.append((name, backend))
        return None, []

    monkeypatch.setattr(join, "join", ask)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    together.meet(Context(World(0, 2, 0, 2, "Open MPI"), Config(world=settings)))  # type: ignore[arg-type]
    assert asked == [expected]


@pytest.mark.alone
@pytest.mark.parametrize(("seconds", "level"), [(0.0, Level.OK), (30.0, Level.WARNING), (-30.0, Level.WARNING)])
def test_clocks(monkeypatch: pytest.MonkeyPatch, seconds: float, level: Level) -> None:
    class Clock:
        perf_counter = staticmethod(time.perf_counter)

        @staticmethod
        def time() -> float:
            return time.time() + (seconds if threading.current_thread().name == "rank 2" else 0.0)

    monkeypatch.setattr(together, "time", Clock)
    for found in in_threads(3, together.clocks):
        assert found.level == level, found
        if seconds:
            told = re.match(r"rank 2 is ([-+][0-9.]+) ms from rank 0", found.found)
            assert told is not None and float(told[1]) == pytest.approx(1e3 * seconds, abs=50)


def test_links_are_measured() -> None:
    for found in in_threads(3, lambda way: links.measure(way, way, CPU)):
        assert [(link.one, link.other) for link in found] == [(0, 1), (1, 2), (0, 2)]
        assert all(link.latency > 0 and link.bandwidth > 0 for link in found)


def test_the_slowest_link_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [links.Link(0, 1, 1e-4, 1e9), links.Link(1, 2, 1e-4, 1e8), links.Link(0, 2, 1e-4, 9e8)]
    told = links.verdict(found, 3)
    assert told.level == Level.WARNING and "ranks 1 and 2, 100 us, 95 MiB/s" in told.found
    assert links.verdict(found[::2], 3).level == Level.OK
    assert "(1 pairs not measured)" in links.verdict(found[:2], 3).found
    assert len(links.pairs(64)) == links.MOST
    monkeypatch.setattr(links, "BUDGET", 0.0)
    assert all(len(part) == 1 for part in in_threads(3, lambda way: links.measure(way, way, CPU)))


# -- what holds it together ------------------------------------------------------------------------------------------


def test_a_check_that_hangs_or_breaks_is_a_finding() -> None:
    ended = threading.Event()

    def hangs() -> Finding:
        ended.wait(20)
        return ok("x", "")

    def breaks() -> Iterator[Finding]:
        yield ok("x", "")
        raise KeyError("nothing")

    assert bounded(hangs, 0.05, "slow")[0].found == "did not end within 0.05 s"
    ended.set()
    assert bounded(breaks, 5, "broken") == [failed("broken", "KeyError: 'nothing'")]
    assert bounded(lambda: warning("a", "b", "c"), 5, "a") == [warning("a", "b", "c")]


def test_own_ranks_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "python", "echo it broke >&2; exit 1")
    monkeypatch.setattr(own_ranks.sys, "executable", str(tmp_path / "python"))
    assert own_ranks.examine(ALONE) == [failed("two ranks", "two ranks of the doctor's own failed: it broke")]
    script(tmp_path / "python", "exec sleep 30")
    monkeypatch.setattr(own_ranks, "SECONDS", 0.2)
    (found,) = own_ranks.examine(ALONE)
    assert "did not end within 0.2 s" in found.found


def test_own_ranks_are_not_the_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "python", 'echo "$@" >&2; env | grep -E "^(TORCHEL|PET|OMPI|PMI|MV2|I_MPI|SLURM|MASTER)" >&2')
    monkeypatch.setattr(own_ranks.sys, "executable", str(tmp_path / "python"))
    said = ("TORCHELASTIC_USE_AGENT_STORE", "PET_NNODES", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_X")
    for name in (*said, "I_MPI_HYDRA_UUID", "SLURM_PROCID", "MASTER_FAMILY", "MASTER_ADDR"):
        monkeypatch.setenv(name, "True")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    texts, read = [], own_ranks._text

    def keep(file: Any) -> str:
        texts.append(read(file))
        return texts[-1]

    monkeypatch.setattr(own_ranks, "_text", keep)
    target = ("digits", "--optimizer.lr", "0.1", "--world.transport=mpi", "--world.device", "cuda", "--log.every=2")
    own_ranks.examine(Context(World(), Config(), target))
    lines = [text.splitlines() for text in texts[1::2]]
    assert len(lines) == 2
    for told in lines:
        assert {line.partition("=")[0] for line in told[1:]} == {"MASTER_ADDR", "MASTER_PORT"}
        assert "MASTER_ADDR=127.0.0.1" in told
        assert "digits --optimizer.lr 0.1 --log.every=2 --world.transport=torch --world.device=cpu" in told[0]


def test_lines_fit_narrow_terminals() -> None:
    finding = Finding("run directory", Level.WARNING, "some words " * 20, "do this", "node-1")
    assert "\n" not in show.line(finding, None)
    assert show.line(finding, None).startswith("warning  run directory           node-1: some words")
    for width in (30, 40, 80):
        assert all(len(part) <= width for part in show.line(finding, width).splitlines())
    assert show.summary([finding, ok("a", "b")]) == "1 ok, 1 warning, 0 failed"


def test_tables_of_links(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    some = [links.Link(one, other, 1e-4, 1e8 * (1 + one + other)) for one, other in links.pairs(3)]
    show.links(some, 3)
    out = capsys.readouterr().out
    assert "100 us" in out and "191 MiB/s" in out
    show.links([links.Link(one, other, 1e-4, 1e8 * (1 + one + other)) for one, other in links.pairs(12)], 12)
    out = capsys.readouterr().out
    assert "0-1" in out and all(len(line) <= 40 for line in out.splitlines()[1:])


def test_findings_travel() -> None:
    found = Finding("a", Level.FAILED, "b", "c", "node-1")
    assert Finding.from_json(json.loads(json.dumps(found.as_json()))) == found
