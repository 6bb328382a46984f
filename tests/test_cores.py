"""Cores and threads: what a rank has, what its part is, and what it is bound to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distloop import cores
from distloop.cores import Cores, bindings, chosen_threads, cpu_quota, listed, node_of_device, shares
from distloop.world import World
from tests.ranks import run_command

ROOT = Path(__file__).parent.parent
TORCHRUN = World(0, 2, 0, 2, "torchrun")


def system(folder: Path, siblings: dict[int, str], nodes: dict[int, str]) -> Path:
    for processor, text in siblings.items():
        place = folder / "devices/system/cpu" / f"cpu{processor}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{text}\n")
    for node, text in nodes.items():
        place = folder / "devices/system/node" / f"node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(f"{text}\n")
    return folder


def single(*processors: int, **own: object) -> Cores:
    """Cores without hyper-threads, eight of them at a memory node."""
    return Cores(tuple((p,) for p in processors), tuple(p // 8 for p in processors), **own)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "numbers"), [("0-3,8", {0, 1, 2, 3, 8}), ("5\n", {5}), ("", set()), ("0,64", {0, 64})]
)
def test_lists_of_the_kernel(text: str, numbers: set[int]) -> None:
    assert listed(text) == numbers


def test_hyper_threads_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "affinity", lambda: {0, 1, 4, 5, 6})
    place = system(tmp_path, {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5", 6: "2,6"}, {0: "0-1,4-5", 1: "2-3,6-7"})
    found = Cores.of_this_process(World(), {}, tmp_path, place)
    assert found.cores == ((0, 4), (1, 5), (6,)) and found.nodes == (0, 0, 1) and found.count == 3


def test_slurm_counts_where_it_started_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "affinity", lambda: set(range(8)))
    given = {"SLURM_CPUS_PER_TASK": "3"}
    by_slurm = World(0, 2, 0, 2, "Slurm")
    assert shares([Cores.of_this_process(by_slurm, given, tmp_path, tmp_path)] * 2) == [3, 3]
    assert shares([Cores.of_this_process(TORCHRUN, given, tmp_path, tmp_path)] * 2) == [4, 4]
    assert Cores.of_this_process(by_slurm, {"SLURM_CPUS_PER_TASK": "x"}, tmp_path, tmp_path).task is None


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [
        ([single(0, 1, 2, 3)], [4]),
        ([single(0, 1, 2, 3)] * 2, [2, 2]),
        ([single(0, 1, 2, 3)] * 3, [1, 1, 1]),
        ([single(0)] * 4, [1, 1, 1, 1]),
        ([single(0, 1), single(2, 3)], [2, 2]),  # bound to cores of their own: not divided
        ([single(0, 1), single(0, 1), single(2, 3), single(2, 3)], [1, 1, 1, 1]),
        ([single(0, 1, 2, 3), single(3)], [3, 1]),
        ([single(0, 1, 2, 3, quota=2.5, group="a")], [2]),
        ([single(0, 1, 2, 3, quota=0.5, group="a")], [1]),
        ([single(0, 1, 2, 3, quota=3.0, group="a")] * 2, [1, 1]),
        ([single(0, 1, quota=2.0, group="a"), single(2, 3, quota=2.0, group="b")], [2, 2]),  # a quota each
    ],
)
def test_shares(of_ranks: list[Cores], expected: list[int]) -> None:
    assert shares(of_ranks) == expected


def test_quotas_of_the_second_version(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    groups.write_text("0::/user/job\n")
    inner = tmp_path / "fs" / "user" / "job"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(groups, tmp_path / "fs") == (None, "")
    (inner.parent / "cpu.max").write_text("350000 100000\n")
    assert cpu_quota(groups, tmp_path / "fs") == (3.5, str(inner.parent))
    (inner / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(groups, tmp_path / "fs") == (1.5, str(inner))
    groups.write_text("0::/not/seen/from/inside\n")  # a container
    (tmp_path / "fs" / "cpu.max").write_text("200000 100000\n")
    assert cpu_quota(groups, tmp_path / "fs")[0] == 2.0


def test_quotas_of_the_first_version(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    groups.write_text("4:memory:/m\n2:cpu,cpuacct:/job\n1:cpuset:/\n")
    inner = tmp_path / "fs" / "cpu" / "job"
    inner.mkdir(parents=True)
    (inner / "cpu.cfs_period_us").write_text("100000\n")
    (inner / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quota(groups, tmp_path / "fs") == (None, "")
    (inner / "cpu.cfs_quota_us").write_text("250000\n")
    assert cpu_quota(groups, tmp_path / "fs") == (2.5, str(inner))
    assert cpu_quota(tmp_path / "none", tmp_path / "fs") == (None, "")


def test_bindings_are_even_and_keep_cores_and_nodes_together() -> None:
    threads = Cores(((0, 8), (1, 9), (2, 10), (3, 11)), (0, 1, 0, 1))
    assert bindings([threads] * 2, [None] * 2) == [(0, 2, 8, 10), (1, 3, 9, 11)]
    assert bindings([single(*range(5))] * 2, [None] * 2) == [(0, 1), (2, 3)]  # alike for all
    assert bindings([single(0, 1)] * 2, [None] * 2) == [(0,), (1,)]
    assert bindings([single(0, 1)] * 2, [None] * 2, least=2) == "there are 2 cores for 2 ranks"


def test_bindings_are_near_the_gpus() -> None:
    host = [single(*range(16))] * 4
    assert bindings(host, [1, 1, 0, 0]) == [(8, 9, 10, 11), (12, 13, 14, 15), (0, 1, 2, 3), (4, 5, 6, 7)]
    assert bindings(host, [1, 1, 0, None])[0] == (0, 1, 2, 3)
    assert bindings([single(0, 1, 2, 8)] * 3, [1, 1, 0]) == [(0,), (1,), (2,)], "one core at the node of two GPUs"


@pytest.mark.parametrize(
    ("of_ranks", "why"),
    [
        ([single(0, 1)], "one rank has them all"),
        ([single(0), single(1)], "their launcher has bound them"),
        ([single(0, 1)] * 3, "there are 2 cores for 3 ranks"),
        ([single(0)] * 2, "there is 1 core for 2 ranks"),
        ([single(0, 1, 2, 3, quota=2.0)] * 2, "a control group limits them to the time of 2 processors"),
    ],
)
def test_what_is_not_bound(of_ranks: list[Cores], why: str) -> None:
    assert bindings(of_ranks, [None] * len(of_ranks)) == why


def test_who_has_chosen_the_threads(tmp_path: Path) -> None:
    own = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}
    parent = tmp_path / str(os.getppid()) / "environ"
    assert not chosen_threads(TORCHRUN, {}, tmp_path)
    assert chosen_threads(TORCHRUN, own, tmp_path), "who cannot be asked counts as the user"
    parent.parent.mkdir()
    parent.write_bytes(b"PATH=/bin\0HOME=/\0")
    assert not chosen_threads(TORCHRUN, own, tmp_path), "torchrun was started without: it was torchrun"
    assert chosen_threads(TORCHRUN, own | {"OMP_NUM_THREADS": "2"}, tmp_path) == 2
    assert chosen_threads(World(0, 2, 0, 2, "Open MPI"), own, tmp_path)
    parent.write_bytes(b"PATH=/bin\0OMP_NUM_THREADS=1\0")
    assert chosen_threads(TORCHRUN, own, tmp_path)
    parent.write_bytes(b"TORCHELASTIC_RUN_ID=none\0PATH=/bin\0")
    assert chosen_threads(TORCHRUN, own, tmp_path), "a script of the user's between torchrun and this"
    parent.write_bytes(b"")
    assert chosen_threads(TORCHRUN, own, tmp_path) == 1


@pytest.mark.parametrize(
    ("text", "threads"), [("3", 3), ("4,2", 4), (" 2 ", 2), ("", None), ("0", None), ("many", None), ("-1", None)]
)
def test_what_openmp_is_told(text: str, threads: int | None) -> None:
    assert chosen_threads(World(), {"OMP_NUM_THREADS": text}) == threads


def test_a_run_does_not_inherit_the_threads_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from distloop.build.threads import set_threads
    from distloop.config import Config

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    here = [Cores(((0,), (1,), (2,)), (0, 0, 0))]
    try:
        deterministic = Config(train={"deterministic": True})  # type: ignore[arg-type]
        assert set_threads(deterministic, World(), here) == "1 (by train.deterministic; 3 cores)"
        assert set_threads(Config(), World(), here) == "2 (by OMP_NUM_THREADS; 3 cores)"
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert set_threads(Config(), World(), here) == "3 (3 cores)"
    finally:
        torch.set_num_threads(before)


def test_nodes_of_devices(tmp_path: Path) -> None:
    place = tmp_path / "bus/pci/devices/0000:3b:00.0"
    place.mkdir(parents=True)
    (place / "numa_node").write_text("1\n")
    assert node_of_device("0000:3B:00.0", tmp_path) == 1
    (place / "numa_node").write_text("-1\n")
    assert node_of_device("0000:3b:00.0", tmp_path) is None
    assert node_of_device("0000:ff:00.0", tmp_path) is None


BOUND = """
import os, threading, time, torch
from distloop.cores import bind, affinity
ready = threading.Event()
other = threading.Thread(target=lambda: ready.wait(20), daemon=True)
other.start()
torch.set_num_threads(2); torch.ones(2000, 2000).sum()
first = min(affinity())
bind([first])
print(sorted({frozenset(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")} ) == [frozenset([first])])
"""


def test_all_threads_are_bound() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOUND], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout == "True\n"


def started(folder: Path, *settings: str, ranks: int = 2, **variables: str) -> tuple[list[int], str, str]:
    ends = run_command(
        "train", "digits", "--train.max_steps", "2", "--log.picture", "false", *settings,
        folder=folder, ranks=ranks, **variables,
    )  # fmt: skip
    lines = [line for end in ends for line in end.out.splitlines() if line.startswith("threads ")]
    return [end.code for end in ends], "\n".join(lines), "".join(end.err for end in ends)


def test_a_run_says_its_threads(tmp_path: Path) -> None:
    here = Cores.of_this_process(World())
    told = f"{len(here.cores)} core{'s' if len(here.cores) > 1 else ''}"
    codes, line, err = started(tmp_path, OMP_NUM_THREADS="1")
    assert codes == [0, 0], err
    assert re.split(r"  +", line) == ["threads", f"1 per rank (by OMP_NUM_THREADS; {told}, 2 ranks)"]
    codes, line, err = started(tmp_path, "--world.threads", "3")
    assert codes == [0, 0], err
    assert "3 per rank (by world.threads; " in line
    codes, line, err = started(tmp_path, "--train.deterministic", "true", ranks=1)
    assert codes == [0], err
    assert f"1 (by train.deterministic; {told})" in line


@pytest.mark.alone
@pytest.mark.skipif(len(cores.affinity()) < 2, reason="needs two cores")
def test_ranks_are_bound_where_that_is_asked_for(tmp_path: Path) -> None:
    codes, line, err = started(tmp_path, "--world.bind", "cores")
    assert codes == [0, 0], err
    assert line.endswith("2 ranks; each bound to its own)")
    ranks = len(cores.affinity()) + 1
    begun = time.monotonic()
    codes, line, err = started(tmp_path, "--world.bind", "cores", ranks=ranks)
    assert codes == [3] * ranks and time.monotonic() - begun < 60
    (said,) = [text for text in err.splitlines() if text.startswith("distloop: ")]
    assert f"world.bind: ranks cannot have cores of their own: there are {ranks - 1} cores for {ranks} ranks" in said


@pytest.mark.slow
def test_torchruns_own_choice_is_not_the_users(tmp_path: Path) -> None:
    """Torchrun sets OMP_NUM_THREADS to 1 where the user has not: a rank takes its part of the cores then."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               "-m", "distloop", "train", "digits", "--train.max_steps", "2", "--log.picture", "false"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    part = max(1, len(Cores.of_this_process(World()).cores) // 2)
    assert f"{part} per rank (" in done.stdout and "by OMP_NUM_THREADS" not in done.stdout


def test_facts_of_cores_travel() -> None:
    import json

    found = replace(Cores.of_this_process(World()), quota=2.5, group="/x", task=3)
    assert Cores.from_json(json.loads(json.dumps(found.as_json()))) == found
    assert torch.get_num_threads() == 1, "what the suite runs with"
