"""Ranks that die, freeze, or leave are known to all and named, whatever the others' main threads wait for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ended, free_port, run_command

pytestmark = pytest.mark.alone  # who does not get its turn on a core is silent too

ROOT = Path(__file__).parent.parent
QUIET = ("--log.tensorboard", "false", "--log.picture", "false", "--data.global_batch_size", "30", "--log.name", "run")
MARK = ".fault"
FROZEN = 2.0  # seconds of silence in these tests


def train(
    folder: Path, fault: str, *settings: str, ranks: int = 3, stays: int | None = None, **env: str
) -> list[Ended]:
    """Return how ranks end of which rank 1 does ``fault`` at step 5, with collectives that would wait for a minute."""
    limits = ["--strategy.name", "naive"]
    for key, value in (("--world.heartbeat", FROZEN), ("--world.timeout", 60)):
        limits += [] if key in settings else [key, str(value)]
    target = "tests.faulty_tasks:Faulty"
    variables = {"FAULT": fault, "FAULT_RANK": "1"} | env
    return run_command(
        "train", target, *QUIET, *limits, *settings, folder=folder, ranks=ranks, stays=stays, **variables
    )


def said(ends: list[Ended]) -> str:
    """Return what was said, by one rank, without a traceback, in at most twelve lines."""
    text = "".join(end.err for end in ends)
    assert "Traceback" not in text, text
    assert len([line for line in text.splitlines() if line.startswith("distloop: ")]) == 1, text
    assert len(text.splitlines()) <= 12, text
    return text


def late(folder: Path, ends: list[Ended], faulty: int = 1) -> float:
    """Return the seconds from the fault to the end of the last of the others."""
    assert all(end.at for rank, end in enumerate(ends) if rank != faulty), "some rank had to be killed"
    return max(end.at for rank, end in enumerate(ends) if rank != faulty) - (folder / MARK).stat().st_mtime


def failure(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("runs/run/failure.json")
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize("others", ["wait", "compute"])
def test_a_killed_rank_is_known_to_all_within_a_second(tmp_path: Path, others: str) -> None:
    ends = train(tmp_path, "kill", OTHERS=others)
    took = late(tmp_path, ends)
    assert [end.code for end in ends] == [10, -9, 10], said(ends)
    assert "rank 1 was killed by signal 9" in said(ends)
    assert took < 1.0 + 0.5, "and half a second for a busy machine"
    print(f"killed, others {others}: {took:.2f} s")


@pytest.mark.parametrize(("fault", "why"), [("stop", "is stopped (SIGSTOP)"), ("hold", "the GIL")])
def test_a_frozen_rank_is_named_within_the_heartbeat(tmp_path: Path, fault: str, why: str) -> None:
    ends = train(tmp_path, fault)
    took = late(tmp_path, ends)
    assert [end.code for end in ends] == [11, -9, 11], said(ends)
    assert "rank 1 has not been heard from for 2 s, at step" in said(ends) and why in said(ends)
    assert FROZEN - 0.5 < took < FROZEN + 2.0
    stacks = sorted(path.name for path in tmp_path.glob("runs/run/logs/stacks-*"))
    assert stacks == ["stacks-rank0.txt", "stacks-rank2.txt"]
    assert "most recent call first" in (tmp_path / "runs/run/logs" / stacks[0]).read_text()
    record = failure(tmp_path)
    assert (record["exit_code"], record["kind"], record["rank"] in (0, 2)) == (11, "RankHungError", True)
    print(f"{fault}: {took:.2f} s")


def test_without_a_heartbeat_the_timeout_alone_finds_it(tmp_path: Path) -> None:
    ends = train(tmp_path, "stop", "--world.heartbeat", "0", "--world.timeout", "4", stays=1)[::2]
    assert [end.code for end in ends] == [11, 11]
    assert "timeout" in said(ends)


@pytest.mark.parametrize(
    ("fault", "code", "words"), [("leave", 10, "sys.exit(0)"), ("vanish", 0, "left with exit code 0")]
)
def test_who_leaves_before_the_end_has_died(tmp_path: Path, fault: str, code: int, words: str) -> None:
    ends = train(tmp_path, fault)
    assert [end.code for end in ends] == [10, code, 10], said(ends)
    assert "rank 1" in said(ends) and words in said(ends)


def test_the_others_end_with_the_code_of_the_first_and_say_nothing(tmp_path: Path) -> None:
    ends = train(tmp_path, "raise")
    assert [end.code for end in ends] == [1, 1, 1]
    text = [end.err for end in ends]
    assert text[0] == text[2] == "" and text[1].count("Traceback") == 1
    record = failure(tmp_path)
    assert (record["rank"], record["exit_code"], record["kind"], record["step"]) == (1, 1, "ValueError", 4)
    assert any("faulty_tasks" in line for line in record["traceback"])
    assert "ValueError" in text[1].splitlines()[-4] or "ValueError" in text[1]


def test_a_short_stop_is_survived(tmp_path: Path) -> None:
    """Rank 1 stops itself; a child of the test lets it go on when it sees that it is stopped, after half the time."""
    ended: list[list[Ended]] = []
    running = threading.Thread(target=lambda: ended.append(train(tmp_path, "stop", PIDFILE=str(tmp_path / "pid"))))
    running.start()
    pid = _pid(tmp_path / "pid.1")
    _until_stopped(pid)
    time.sleep(FROZEN / 2)  # the length of the stop is what is tested
    os.kill(pid, signal.SIGCONT)
    running.join(60)
    assert [end.code for end in ended[0]] == [0, 0, 0], "".join(end.err for end in ended[0])


def test_all_may_be_suspended_for_longer_than_the_heartbeat(tmp_path: Path) -> None:
    """As a scheduler does with a whole job; nobody counts the time in which it did not run itself."""
    ended: list[list[Ended]] = []
    variables = {"OTHERS": "stop", "PIDFILE": str(tmp_path / "pid")}
    running = threading.Thread(target=lambda: ended.append(train(tmp_path, "stop", **variables)))
    running.start()
    pids = [_pid(tmp_path / f"pid.{rank}") for rank in range(3)]
    for pid in pids:
        _until_stopped(pid)
    time.sleep(FROZEN * 1.5)  # the length of the stop is what is tested
    os.kill(pids[0], signal.SIGCONT)
    time.sleep(FROZEN * 0.3)  # so it looks for the others before they go on
    for pid in pids[1:]:
        os.kill(pid, signal.SIGCONT)
    running.join(60)
    assert [end.code for end in ended[0]] == [0, 0, 0], "".join(end.err for end in ended[0])


def test_a_frozen_rank_that_keeps_the_store_is_named_too(tmp_path: Path) -> None:
    """Without a launcher's store rank 0 has it, and nothing that is asked of it returns."""
    port = {"MASTER_PORT": str(free_port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    ends = train(tmp_path, "stop", stays=0, **port | {"FAULT_RANK": "0"})
    took = late(tmp_path, ends, faulty=0)
    assert [end.code for end in ends[1:]] == [11, 11], said(ends)
    assert "rank 0, which keeps their store, has not answered" in said(ends) and "is stopped (SIGSTOP)" in said(ends)
    assert FROZEN - 0.5 < took < FROZEN + 3.0
    print(f"store: {took:.2f} s")


def _pid(path: Path) -> int:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, f"{path.name} was not written"
        time.sleep(0.01)
    return int(path.read_text())


def _until_stopped(pid: int) -> None:
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def torchrun(folder: Path, *arguments: str, ranks: int = 2, **variables: str) -> subprocess.Popen[str]:
    """Start ranks by torchrun; its output goes to a file."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--standalone",
        *arguments,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    with (folder / "out").open("w") as out:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_end_with_their_launcher(tmp_path: Path, ranks: int) -> None:
    task = ("-m", "distloop", "train", "tests.faulty_tasks:Endless", *QUIET, "--train.epochs", "100000")
    with torchrun(tmp_path, *task, ranks=ranks, PIDFILE=str(tmp_path / "pid")) as launcher:
        pids = [_pid(tmp_path / f"pid.{rank}") for rank in range(ranks)]
        assert all(map(alive, pids))
        launcher.kill()
        begun = time.monotonic()
        launcher.wait()
        while any(map(alive, pids)) and time.monotonic() - begun < 20:
            time.sleep(0.01)
        took = time.monotonic() - begun
    for pid in filter(alive, pids):
        os.kill(pid, signal.SIGKILL)
    assert took < 5
    print(f"orphans: {took:.2f} s")


@pytest.mark.slow
def test_torchrun_restarts_form_anew_and_go_on(tmp_path: Path) -> None:
    variables = {"FAULT": "kill", "FAULT_RANK": "1", "FAULT_ATTEMPTS": "1"}
    task = ("-m", "distloop", "train", "tests.faulty_tasks:Faulty", *QUIET, "--train.epochs", "3")
    task += ("--checkpoint.every_steps", "2", "--checkpoint.background", "false")
    with torchrun(tmp_path, "--max-restarts", "1", *task, **variables) as launcher:
        code = launcher.wait(100)
    out = (tmp_path / "out").read_text()
    assert code == 0, out
    # How it ended can be read until torchrun has taken note of it, which may be before the other rank looks.
    assert "rank 1 was killed by signal 9" in out or "rank 1 has ended" in out, out
    assert "resumed       from step 4, of 2 ranks" in out, "nobody has told it to"
    assert json.loads((tmp_path / "runs/run/result.json").read_text())["steps"] == 12, out
