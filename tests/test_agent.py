"""distloop's torchrun: the ranks' own exit code, signals that reach every rank once, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distloop.agent_codes import telling
from distloop.agent_signals import catches
from tests.ranks import ROOT, Ended, Job

RANK = str(ROOT / "tests" / "agent_rank.py")


def agent(arguments: list[str]) -> None:
    """Be ``python -m distloop.agent ARGUMENTS``."""
    from distloop.agent import main

    main(arguments)


def start(words: str, folder: Path, *options: str) -> Job:
    ranks = str(len(words.split(",")))
    arguments = ("--nproc-per-node", ranks, *options, RANK, words, str(folder))
    return Job(*arguments, folder=folder, main=agent, PYTHONPATH=str(ROOT), **{"OMP_NUM_THREADS": "1"})


def end(job: Job, seconds: float = 30) -> Ended:
    over = job.wait(seconds)
    ended = job.end()[0]
    assert over, f"hangs: {ended}"
    return ended


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.01)


def pids(folder: Path) -> list[int]:
    return [int(pid) for path in folder.glob("started-*") for pid in path.read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 75], 75),
        ([75, 143], 75),
        ([75, -9], 75),
        ([10, 2, 2], 2),
        ([10, 13], 13),
        ([21, 75], 21),
        ([1, 10], 1),
        ([10, 11], 11),
        ([-9, 10], 10),
        ([10, 42], 42),
        ([-9, 0], 137),
        ([-6, -15], 134),
        ([130, 75], 75),
    ],
)
def test_the_most_telling_code_is_found(codes: list[int], expected: int) -> None:
    assert telling(codes) == expected
    assert telling(reversed(codes)) == expected


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("0,0", 0, ""),
        ("75,75", 75, ""),
        ("10,13", 13, ""),
        ("10,kill", 10, ""),
        ("0,kill", 137, "was killed by SIGKILL"),
    ],
)
def test_it_ends_with_the_code_of_its_ranks(tmp_path: Path, words: str, code: int, said: str) -> None:
    ended = end(start(words, tmp_path))
    assert ended.code == code, ended
    assert ended.err.count("\n") == (1 if said else 0), ended.err
    assert said in ended.err


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("late,ask", signal.SIGUSR1),  # the others end a rank that only starts
        ("ask,ask", signal.SIGUSR2),
        ("ask,ask", signal.SIGTERM),
        ("ask,ask", signal.SIGINT),
    ],
)
def test_each_rank_is_asked_once_it_can_bear_it(tmp_path: Path, words: str, number: signal.Signals) -> None:
    job = start(words, tmp_path)
    until(lambda: len(pids(tmp_path)) == 2 and (tmp_path / "ready-1").exists())
    if words == "ask,ask":
        until((tmp_path / "ready-0").exists)
    job.send(0, number)
    ended = end(job)
    assert (ended.code, ended.err) == (75, "")
    asked = [(tmp_path / f"asked-{rank}").read_text().split()[0] for rank in range(2)]
    assert asked == [str(number.value)] * 2


def test_a_signal_from_the_scheduler_and_from_the_agent_is_one(tmp_path: Path) -> None:
    job = start("ask,ask", tmp_path)
    until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(2)))
    job.send(0, signal.SIGTERM)
    job.send(0, signal.SIGTERM)
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.1)
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGTERM)
    ended = end(job)
    assert (ended.code, ended.err) == (75, "")


@pytest.mark.alone
def test_a_second_order_kills(tmp_path: Path) -> None:
    job = start("hang,hang", tmp_path)
    until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(2)))
    job.send(0, signal.SIGTERM)
    assert not job.wait(1.0), "it lets them use their time"
    begun = time.monotonic()
    job.send(0, signal.SIGTERM)
    ended = end(job)
    assert (ended.code, ended.err) == (143, "")
    assert time.monotonic() - begun < 2
    until(lambda: all(map(gone, pids(tmp_path))), 2)


def test_a_killed_agent_leaves_nobody(tmp_path: Path) -> None:
    job = start("hang,hang", tmp_path)
    until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(2)))
    job.send(0, signal.SIGKILL)
    assert end(job).code == -9
    assert len(pids(tmp_path)) == 2
    until(lambda: all(map(gone, pids(tmp_path))), 5)


@pytest.mark.parametrize(("words", "code", "starts"), [("75,75", 75, 1), ("10,10", 10, 2)])
def test_only_what_may_go_better_is_started_again(tmp_path: Path, words: str, code: int, starts: int) -> None:
    ended = end(start(words, tmp_path, "--max-restarts", "1"))
    assert (ended.code, ended.err) == (code, "")
    assert len((tmp_path / "started-0").read_text().split()) == starts


def test_an_agent_that_waits_for_others_ends_at_once(tmp_path: Path) -> None:
    job = start("0", tmp_path, "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    assert not job.wait(1.0)
    job.send(0, signal.SIGTERM)
    assert end(job, 5).code == 143
    assert pids(tmp_path) == []


BUSY = """
import os, signal, subprocess, sys, time
from distloop.agent_signals import Passing
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which ranks inherit
ranks = [subprocess.Popen(["sh", "-c", f"sleep 0.2; exit {code}"]) for code in sys.argv[1:]]
passing = Passing()
passing.processes = ranks
if "asks" in os.environ:
    [process.wait() for process in ranks]
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)  # as in C++, for hosts that do not come
"""


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize(("codes", "expected"), [(["75", "0"], 75), (["0", "0"], 0), (["13", "10"], 13), ([], 143)])
def test_an_agent_that_is_held_up_ends_with_the_code_of_its_ranks(codes: list[str], expected: int, asks: bool) -> None:
    command = [sys.executable, "-c", BUSY, *codes]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"asks": "1"} if asks else {})
    ended = subprocess.run(command, capture_output=True, text=True, timeout=18, check=False, env=environment)
    assert (ended.returncode, ended.stderr) == (expected, "")


@pytest.mark.slow
def test_others_that_cannot_be_found_are_a_sentence(tmp_path: Path) -> None:
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "no.such.host.invalid:29400", "--rdzv-conf", "read_timeout=2"]
    command = [sys.executable, "-m", "distloop.agent", "--nnodes", "2", *where, RANK, "0", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CPP_LOG_LEVEL"} | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=environment)
    assert ended.returncode == 3
    found = "distloop: the agents of 2 hosts did not find or lost each other at no.such.host.invalid:29400: "
    assert ended.stderr.startswith(found), ended.stderr
    assert ended.stderr.count("\n") == 1


def test_who_catches_a_signal_is_known() -> None:
    assert not catches(os.getpid(), signal.SIGUSR2)
    before = signal.signal(signal.SIGUSR2, lambda number, frame: None)
    try:
        assert catches(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
