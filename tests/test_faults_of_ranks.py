"""Ranks that die, fall silent, or do not do the same: the others end soon, alike, and say why in one sentence."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faulty_tasks import MARK
from tests.ranks import Ended, run_command

pytestmark = pytest.mark.alone  # a rank that starts late, or ends late, is what is measured

ROOT = Path(__file__).parent.parent
QUIET = ("--log.tensorboard", "false", "--log.picture", "false", "--data.global_batch_size", "30")
SOON = 3.0  # seconds, generously; docs say about one
TIMEOUT = 2


def train(folder: Path, task: str, *settings: str, stays: int | None = None, **variables: str) -> list[Ended]:
    """Return how three ranks end that train ``task`` in small buckets."""
    folder.mkdir(exist_ok=True)
    target = f"tests.faulty_tasks:{task}"
    small = ("--strategy.bucket_mb", "0.0005", *QUIET)
    return run_command("train", target, *small, *settings, folder=folder, ranks=3, stays=stays, **variables)


def sentences(ends: list[Ended]) -> list[str]:
    """Return what was said; nobody may show a traceback."""
    text = "".join(end.err for end in ends)
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("distloop: ")]


def seconds(folder: Path, ends: list[Ended], faulty: int) -> float:
    """Return the time from the fault to the end of the last of the other ranks."""
    assert all(end.at for rank, end in enumerate(ends) if rank != faulty), "some rank had to be killed"
    return max(end.at for rank, end in enumerate(ends) if rank != faulty) - (folder / MARK).stat().st_mtime


def all_of(
    folder: Path, cases: list[tuple[str, str]], fault: str, faulty: int, *settings: str
) -> dict[str, tuple[float, list[int], list[str]]]:
    """Let a rank fail under each (strategy, transport), some at a time; return seconds, codes and sentences."""

    def one(case: tuple[str, str]) -> tuple[float, list[int], list[str]]:
        strategy, transport = case
        place = folder / f"{strategy}-{transport}"
        ends = train(
            place,
            "Faulty",
            *("--strategy.name", strategy, "--world.transport", transport, *settings),
            stays=faulty if fault != "kill" else None,
            FAULT=fault,
            FAULT_RANK=str(faulty),
        )
        codes = [end.code for rank, end in enumerate(ends) if rank != faulty]
        return seconds(place, ends, faulty), codes, sentences(ends)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(map("-".join, cases), pool.map(one, cases), strict=True))


KILLED = [("naive", "sockets"), ("ring", "sockets"), ("direct", "shared_memory"), ("auto", "shared_memory")]
KILLED += [("zero_offload", "sockets"), ("zero_offload", "shared_memory")]
KILLED_TOO = [("direct", "sockets"), ("auto", "sockets"), ("naive", "shared_memory"), ("ring", "shared_memory")]
KILLED_TOO += [("direct", "torch"), ("ring", "torch"), ("auto", "torch"), ("zero_offload", "torch")]


@pytest.mark.parametrize(
    "cases", [[*KILLED, ("naive", "torch"), ("ddp", "torch")], pytest.param(KILLED_TOO, marks=pytest.mark.chaos)]
)
def test_a_killed_rank_ends_the_others_at_once(tmp_path: Path, cases: list[tuple[str, str]]) -> None:
    for case, (late, codes, said) in all_of(tmp_path, cases, "kill", 1).items():
        assert late < SOON, case
        assert codes == [10, 10], (case, said)
        assert len(said) == 1, (case, said)
        if case == "ddp-torch":
            assert "another rank has ended" in said[0], "gloo does not say which"
        else:
            where = r"step 5, bucket 1 of 3 \(\w+, 200 bytes\)"
            if "zero_offload" in case:  # what was on its way then is a matter of microseconds
                where = r"step [45], bucket \d of \d \((reduce-scatter|all-gather), [\d,]+ bytes\)"
            assert re.search(f"{where}: rank 1 ", said[0]), (case, said)


def test_loader_workers_do_not_keep_a_killed_rank_seemingly_alive(tmp_path: Path) -> None:
    for transport in ("sockets", "torch"):
        folder, settings = tmp_path / transport, ("--strategy.name", "direct", "--data.workers", "1")
        variables = {"FAULT": "kill", "FAULT_RANK": "1", "FAULT_STEP": "3"}
        ends = train(folder, "WithWorkers", *settings, "--world.transport", transport, stays=None, **variables)
        assert [end.code for end in ends] == [10, -9, 10], sentences(ends)
        assert seconds(folder, ends, 1) < SOON
        assert re.search("rank 1 (of this host )?has ended", sentences(ends)[0])


def test_a_silent_rank_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    limit = ("--world.timeout", str(TIMEOUT))
    stopped = [("naive", "sockets"), ("auto", "shared_memory"), ("ring", "torch")]
    asleep = [("ring", "sockets"), ("direct", "shared_memory"), ("ddp", "torch")]
    for fault, faulty, cases in (("stop", 2, stopped), ("sleep", 0, asleep)):
        for case, (late, codes, said) in all_of(tmp_path, cases, fault, faulty, *limit).items():
            assert TIMEOUT - 0.5 < late < TIMEOUT + SOON, case
            assert codes == [11, 11], (case, said)
            assert len(said) == 1, (case, said)
            assert "heard from" in said[0] and said[0].endswith(f"; silent altogether: rank {faulty}"), (case, said)
            assert "ddp" in case or re.match(r"distloop: step 5, bucket 1 of 3 \(\w+, 200 bytes\): ", said[0]), said


@pytest.mark.parametrize(
    ("task", "first", "other"),
    [
        ("AnotherOrder", r'objectives is \["actor", "critic"\] on rank 0', r'\["critic", "actor"\] on rank 1'),
        ("AnotherTurn", r'turns is {"actor": 1, "critic": 1} on rank 0', r'{"actor": 1, "critic": 2} on rank 1'),
        ("AnotherShape", r"rank 1's model differs from rank 0's", r"\(16, 4\)|\(17, 4\)|\(18, 4\)"),
    ],
)
def test_ranks_that_differ_are_told_before_the_first_step(tmp_path: Path, task: str, first: str, other: str) -> None:
    ends = train(tmp_path, task, "--strategy.name", "direct")
    assert [end.code for end in ends] == [12, 12, 12], "".join(end.err for end in ends)
    (said,) = sentences(ends)
    assert re.search(first, said) and re.search(other, said), said
    assert "step " not in "".join(end.out for end in ends)


def test_a_gradient_that_was_replaced_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    ends = train(tmp_path, "Replaced", "--strategy.name", "direct")
    assert [end.code for end in ends] == [2, 2, 2]  # of the others too: theirs is no failure of its own
    (said,) = sentences(ends)
    assert re.search(r"the gradient of parameter '(weight|bias)' no longer lies in its bucket", said), said
