"""Ranks started by hand, as a job script would: each mistake is one sentence and exit code 3, and nobody waits long."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.ranks import Ended, Job, free_port

pytestmark = pytest.mark.timeout(90)

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.yaml")
QUICK = {
    "DISTLOOP_TRAIN__MAX_STEPS": "3",
    "DISTLOOP_LOG__TENSORBOARD": "false",
    "DISTLOOP_LOG__PICTURE": "false",
    "DISTLOOP_WORLD__TIMEOUT": "30",
}
PATIENCE = 40.0  # seconds for what takes two or three on a machine that has nothing else to do


def rank(number: int, size: int, port: int, **more: str) -> dict[str, str]:
    return {"RANK": str(number), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | more


def begin(folder: Path, variables: Mapping[str, str], *settings: str, target: str = DIGITS) -> Job:
    """Start one rank, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    return Job("train", target, *settings, folder=folder, **QUICK | variables)


def end(*jobs: Job) -> list[Ended]:
    for job in jobs:
        job.wait(PATIENCE)
    ended = [job.end()[0] for job in jobs]
    for one in ended:
        assert "Traceback" not in one.err, one.err
    return ended


def said(ended: list[Ended]) -> list[str]:
    return [line.removeprefix("distloop: ") for one in ended for line in one.err.splitlines() if line]


def test_ranks_started_by_hand_train(tmp_path: Path) -> None:
    port = free_port()
    names = ("--log.directory", str(tmp_path / "runs"), "--log.name", "one")
    ended = end(*(begin(tmp_path / f"r{n}", rank(n, 3, port), *names) for n in (2, 0, 1)))
    assert [one.code for one in ended] == [0, 0, 0], [one.err for one in ended]
    assert "3 ranks" in ended[1].out
    assert json.loads((tmp_path / "runs" / "one" / "result.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"WORLD_SIZE": "3"}, r"was started as one of 3 ranks, and rank 0 \(process \d+ on .*\) as one of 2"),
        ({"RANK": "0"}, r"127\.0\.0\.1:\d+ belongs to another job whose rank 0 is process \d+ on .*: give one of the"),
        ({"TORCHELASTIC_RUN_ID": "x"}, r"127\.0\.0\.1:\d+ belongs to another job whose rank 0 is process \d+ on"),
        (
            {"DISTLOOP_OPTIMIZER__LR": "0.5"},
            r"ranks differ: configuration optimizer.lr is 0[.]\d+ on rank 0 \(process ",
        ),
    ],
)
def test_ranks_that_do_not_fit(tmp_path: Path, others: dict[str, str], message: str) -> None:
    port = free_port()
    brief = {"DISTLOOP_WORLD__TIMEOUT": "4"}
    first, second = (begin(tmp_path / f"r{n}", rank(n, 2, port) | brief | more) for n, more in ((0, {}), (1, others)))
    ended = end(first, second)
    assert [one.code for one in ended] == [3, 3], [one.err for one in ended]
    assert any(re.search(message, line) for line in said(ended)), said(ended)
    assert all(len(said([one])) <= 1 for one in ended), said(ended)


def test_a_rank_there_twice_is_refused_and_said_where(tmp_path: Path) -> None:
    port = free_port()
    ranks = [begin(tmp_path / f"r{i}", rank(n, 3, port)) for i, n in enumerate((0, 1, 1))]
    ended = end(*ranks)
    assert [one.code for one in ended] == [3, 3, 3]
    assert all("rank 1 is there twice: rank 1 (process" in line for line in said(ended)) and said(ended)


def test_two_jobs_on_one_port_never_merge(tmp_path: Path) -> None:
    port = free_port()
    more = (
        "--log.directory",
        str(tmp_path / "runs"),
        "--log.name",
        "one",
        "--train.max_seconds",
        "8",
        "--train.epochs",
        "1000",
    )
    long = {"DISTLOOP_TRAIN__MAX_STEPS": "100000", "DISTLOOP_TRAIN__MAX_SECONDS": "8"}
    going = [begin(tmp_path / f"r{n}", rank(n, 2, port, **long), *more) for n in (0, 1)]
    log = tmp_path / "r0" / ".out0"
    for _ in range(400):
        if log.exists() and "strategy" in log.read_text():
            break
        going[0].wait(0.1)
    late = end(begin(tmp_path / "late0", rank(0, 2, port)), begin(tmp_path / "late1", rank(1, 2, port)))
    assert [one.code for one in late] == [3, 3]
    assert "belongs to another job whose rank 0 is process" in said(late)[0]
    assert "rank 1 is there twice" in said(late)[1] and "goes on with those it began with" in said(late)[1]
    ended = end(*going)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]


def test_jobs_that_differ_in_their_names_alone_do_not_merge(tmp_path: Path) -> None:
    port = free_port()
    ended = end(*(begin(tmp_path / name, rank(n, 2, port), "--log.name", name) for n, name in enumerate("ab")))
    assert [one.code for one in ended] == [3, 3]
    assert 'configuration log.name is "a" on rank 0' in said(ended)[0]


def test_a_port_in_use_says_whose_it_is(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        (ended,) = end(begin(tmp_path / "r0", rank(0, 2, server.getsockname()[1])))
    assert ended.code == 3
    assert "is in use by process" in said([ended])[0] and "set MASTER_PORT to a free port" in said([ended])[0]


def test_a_master_that_does_not_resolve(tmp_path: Path) -> None:
    ended = end(*(begin(tmp_path / f"r{n}", rank(n, 2, free_port(), MASTER_ADDR="no-host.invalid")) for n in (0, 1)))
    assert [one.code for one in ended] == [3, 3]
    assert "MASTER_ADDR='no-host.invalid' does not resolve on" in said(ended)[0]


def test_the_master_of_several_hosts_is_not_loopback(tmp_path: Path) -> None:
    own = rank(1, 2, free_port(), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK="1")
    (ended,) = end(begin(tmp_path / "r1", own))
    assert ended.code == 3
    assert "within 10 s: connection refused; MASTER_ADDR='127.0.0.1' is" in said([ended])[0]
    assert "if rank 0 is elsewhere, set it to a name" in said([ended])[0]


def test_other_code_on_one_rank_is_named(tmp_path: Path) -> None:
    task = (ROOT / "tests" / "user_tasks.py").read_text()
    port, jobs = free_port(), []
    for n in (0, 1):
        (folder := tmp_path / f"r{n}").mkdir()
        (folder / "my_own_task.py").write_text(task + f"\nVERSION = {n}\n")
        jobs.append(begin(folder, rank(n, 2, port), target="my_own_task:Fine"))
    ended = end(*jobs)
    assert [one.code for one in ended] == [3, 3]
    assert "ranks differ: code of my_own_task is " in said(ended)[0], said(ended)
