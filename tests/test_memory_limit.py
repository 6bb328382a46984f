"""A rank killed for the job's memory limit is reported as that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from distloop.memory_limit import MemoryLimit
from tests.ranks import Ended, command, run_command

LIMIT = 200 * 2**20


def groups(folder: Path, version: int) -> tuple[Path, Path, Path, Path]:
    """Return a process's list of groups, where they are mounted, and the files of its group."""
    proc = folder / "cgroup"
    proc.write_text("9:name=systemd:/\n4:memory:/job/7\n0::/\n" if version == 1 else "0::/job/7\n")
    top = folder / "memory" if version == 1 else folder
    names = ("memory.oom_control", "memory.limit_in_bytes") if version == 1 else ("memory.events", "memory.max")
    (top / "job" / "7").mkdir(parents=True)
    for place, limit in ((top, "max" if version == 2 else str(2**63 - 4096)), (top / "job" / "7", str(LIMIT))):
        (place / names[0]).write_text("oom_kill_disable 0\noom_kill 3\n")
        (place / names[1]).write_text(limit + "\n")
    return proc, folder, top / "job" / "7" / names[0], top / names[0]


@pytest.mark.parametrize("version", [1, 2])
def test_a_count_that_rises_is_a_kill(tmp_path: Path, version: int) -> None:
    proc, mounted, events, outer = groups(tmp_path, version)
    limit = MemoryLimit(proc, mounted)
    assert limit.has_killed() is None
    events.write_text("oom_kill_disable 0\noom_kill 4\n")
    assert limit.has_killed() == "the memory limit of 200 MiB"
    events.write_text("")
    outer.write_text("under_oom 0\noom_kill 4\n")
    assert limit.has_killed() is not None, "that of a group around it counts as well"


def test_where_there_are_no_groups_nothing_is_said(tmp_path: Path) -> None:
    assert MemoryLimit(tmp_path / "none", tmp_path).has_killed() is None


@pytest.fixture
def group() -> Iterator[Path]:
    path = Path(f"/sys/fs/cgroup/memory/distloop-test-{os.getpid()}")
    try:
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text(str(LIMIT))
    except OSError as failure:
        pytest.skip(f"no control group can be made here: {failure}")
    yield path
    path.rmdir()


def in_group(arguments: list[str]) -> None:
    """Be ``distloop ARGUMENTS`` in a control group."""
    Path(os.environ["GROUP"], "cgroup.procs").write_text(str(os.getpid()))
    command(arguments)


@pytest.mark.alone
def test_a_rank_over_the_limit_is_reported_so(tmp_path: Path, group: Path) -> None:
    quiet = ("--log.tensorboard", "false", "--log.picture", "false", "--strategy.name", "naive", "--log.name", "run")
    ends: list[Ended] = run_command(
        *("train", "tests.faulty_tasks:Faulty", *quiet, "--data.global_batch_size", "30"),
        folder=tmp_path,
        ranks=2,
        FAULT="eat",
        FAULT_RANK="1",
        GROUP=str(group),
        main=in_group,
    )
    assert [end.code for end in ends] == [10, -9], ends[0].err
    assert "rank 1 was killed by the memory limit of 200 MiB" in ends[0].err
