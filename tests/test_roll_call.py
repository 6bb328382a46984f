"""The roll call before a run: who is missing, there twice, of another job, or different; strangers do no harm."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distloop.errors import DistloopError, RankDiedError, WorldError
from distloop.transports import introduction
from distloop.transports.introduction import Caller, Verdict, introduce, whose
from distloop.transports.roll_call import RollCall

pytestmark = [pytest.mark.timeout(60), pytest.mark.alone]

STORE = "10.0.0.1 4711"


def caller(rank: int, size: int = 2, **what: Any) -> Caller:
    own = Caller(rank, size, "job A", f"host{rank}", 100 + rank, f"place{rank}", f"10.0.0.{rank + 1}", {"lr": 0.1})
    return replace(own, **what)


class Rolled:
    """Rank 0's roll call under way, and callers that come to it."""

    def __init__(self, own: Caller, timeout: float):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.where = [("127.0.0.1", self.listener.getsockname()[1])]
        self.said: list[str] = []
        self.sure = True
        self.call = RollCall(own, [self.listener], STORE, timeout, self.said.append)
        self.results: dict[int, Verdict | DistloopError] = {}
        self._threads: list[threading.Thread] = []
        self._start(-1, self.call.hold)

    def come(self, own: Caller, timeout: float = 10.0, key: int | None = None) -> None:
        self._start(
            own.rank if key is None else key,
            lambda: introduce(own, lambda: self.where, timeout, self.said.append, sure=self.sure),
        )

    def _start(self, key: int, work: Callable[[], Verdict]) -> None:
        def run() -> None:
            try:
                self.results[key] = work()
            except DistloopError as failure:
                self.results[key] = failure

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def end(self) -> dict[int, Verdict | DistloopError]:
        """Return what each heard; rank 0's, which decides and raises later, is at -1."""
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        return self.results


@contextmanager
def rolled(size: int = 2, timeout: float = 10.0, **what: Any) -> Iterator[Rolled]:
    one = Rolled(caller(0, size, **what), timeout)
    yield one
    one.call.close()


def refusals(results: dict[int, Verdict | DistloopError]) -> list[str]:
    return [one.refused if isinstance(one, Verdict) else str(one) for _, one in sorted(results.items())]


def test_all_come_and_hear_where_to_meet() -> None:
    with rolled(9) as roll:
        for rank in range(1, 9):
            roll.come(caller(rank, 9))
        assert roll.end() == dict.fromkeys([-1, *range(1, 9)], Verdict(store=STORE))
        assert roll.said == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"size": 3},
            "rank 1 (process 101 on host1) was started as one of 3 ranks, and rank 0 (process 100 on host0) as",
        ),
        ({"rank": 2}, "rank 2 (process 101 on host1) is none of the ranks 0 to 1 of rank 0 (process 100 on host0)"),
        ({"facts": {"lr": 0.2}}, "ranks differ: lr is 0.1 on rank 0 (process 100 on host0) and 0.2 on rank 1 (process"),
        ({"facts": {"lr": 0.1, "new": 1}}, "ranks differ: new is null on rank 0"),
        ({"address": "127.0.0.1"}, "rank 1 (process 101 on host1) can be reached at 127.0.0.1 alone, and other ranks"),
    ],
)
def test_what_does_not_fit_is_said_to_all_at_once(other: dict[str, Any], message: str) -> None:
    with rolled() as roll:
        begun = time.monotonic()
        roll.come(replace(caller(1), **other), key=1)
        heard = refusals(roll.end())
        assert time.monotonic() - begun < 2
    assert len(heard) == 2 and heard[0] == heard[1] and heard[0].startswith(message)


def test_a_rank_there_twice_is_named_with_both_hosts() -> None:
    with rolled(3) as roll:
        roll.come(caller(1, 3))
        time.sleep(0.2)
        roll.come(caller(1, 3, host="elsewhere", pid=7), key=2)
        heard = refusals(roll.end())
    assert heard == ["rank 1 is there twice: rank 1 (process 101 on host1), and rank 1 (process 7 on elsewhere)"] * 3


def test_who_comes_when_all_are_there_is_refused_alone() -> None:
    with rolled() as roll:
        roll.come(caller(1))
        assert refusals(roll.end()) == ["", ""]
        for late in (caller(1, pid=7), caller(2, 3)):
            with pytest.raises(WorldError, match=r"the run goes on with those it began with") as refused:
                introduce(late, lambda: roll.where, 5, roll.said.append)
            assert not refused.value.everywhere


def test_jobs_never_merge() -> None:
    with rolled() as roll:
        with pytest.raises(
            WorldError, match=r"belongs to another job, job A, whose rank 0 is process 100 on host0: give"
        ):
            introduce(caller(1, job="job B"), lambda: roll.where, 5, roll.said.append)
        roll.come(caller(1))
        assert refusals(roll.end()) == ["", ""]
        assert whose(*roll.where[0]).startswith("belongs to another job, job A, whose rank 0 is process 100 on host0")


def test_a_port_that_is_taken_says_by_whom() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = whose(*server.getsockname())
    assert told.startswith(f"is in use by process {os.getpid()} (") and told.endswith("a free port of rank 0's host")


def test_ranks_find_the_port_that_rank_0_took() -> None:
    with rolled(job="other") as other, rolled() as roll, socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()
        closed.close()
        roll.where, roll.sure = [nobody, *other.where, *roll.where], False
        roll.come(caller(1))
        assert roll.end()[1] == Verdict(store=STORE)
        other.come(caller(1, job="other"))
        assert refusals(other.end()) == ["", ""]


def test_missing_ranks_are_named_and_where_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distloop.transports.roll_call.NOTICE", 0.4)
    with rolled(20, timeout=1.0) as roll:
        roll.come(caller(1, 20, host="host0"))
        roll.come(caller(2, 20))
        heard = refusals(roll.end())
    listed = ", ".join(map(str, range(3, 19)))
    missing = f"ranks {listed} and 1 more of 20 did not come (here: 0, 1 on host0; 2 on host2)"
    assert heard == [f"{missing} within 1 s (world.timeout)"] * 3
    assert roll.said[0] == f"{missing} after 0 s, of 1"


def test_a_rank_that_leaves_ends_the_waiting() -> None:
    with rolled(4) as roll:
        roll.come(caller(1, 4))
        with socket.create_connection(roll.where[0]) as leaving:
            leaving.sendall(introduction.line({"distloop": 1} | vars(caller(2, 4))))
            leaving.recv(100)
        results = roll.end()
    assert refusals(results) == ["rank 2 (process 102 on host2) ended before all ranks had come"] * 2
    assert isinstance(results[1], RankDiedError)


def test_rank_0_that_leaves_is_no_longer_waited_for() -> None:
    def rank_0(server: socket.socket) -> None:
        connection, _ = server.accept()
        connection.recv(1 << 16)
        connection.sendall(b'{"here": "job A"}\n')
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=rank_0, args=(server,), daemon=True).start()
        with pytest.raises(RankDiedError, match=r"rank 0 \(on 127.0.0.1\) ended before all ranks had come"):
            introduce(caller(1), lambda: [server.getsockname()], 5, print)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "is not rank 0 of a run of distloop: what listens there says nothing; give one"),
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "is not rank 0 of a run of distloop: what listens there speaks otherwise",
        ),
        (b'{"refused": 1}\n', "speaks otherwise"),
        (b"[]\n", "speaks otherwise"),
        (b"[" * 100_000 + b"\n", "speaks otherwise"),
        (b"x" * (1 << 20), "speaks otherwise"),
    ],
)
def test_a_stranger_on_the_port_is_told_from_rank_0(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, message: str
) -> None:
    monkeypatch.setattr(introduction, "ANSWER", 0.5)

    def stranger(server: socket.socket) -> None:
        connection, _ = server.accept()
        if answer is not None:
            connection.sendall(answer)
            connection.recv(1 << 16)
        else:
            time.sleep(2)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=stranger, args=(server,), daemon=True).start()
        with pytest.raises(WorldError) as refused:
            introduce(caller(1), lambda: [server.getsockname()], 5, print)
    assert message in str(refused.value)


def test_nobody_there_is_an_error_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introduction, "NOTICE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = server.getsockname()
    said: list[str] = []
    with pytest.raises(WorldError, match=r"could not reach rank 0 at 127.0.0.1:\d+ within 1 s: connection refused; is"):
        introduce(caller(1), lambda: [where], 1.0, said.append)
    assert said and "has not reached rank 0" in said[0]


@settings(max_examples=200, deadline=None)
@given(sent=st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_what_strangers_send_does_not_disturb(sent: bytes) -> None:
    roll = _standing()
    with socket.create_connection(roll.where[0], timeout=5) as stranger:
        stranger.sendall(sent + b"\n")
        stranger.settimeout(5)
        assert stranger.recv(100) == b"", "it hangs up"


_rolls: list[Rolled] = []


def _standing() -> Rolled:
    if not _rolls:
        _rolls.append(Rolled(caller(0), 300.0))
    return _rolls[0]


def test_after_all_strangers_the_ranks_still_come() -> None:
    roll = _standing()
    silent = [socket.create_connection(roll.where[0]) for _ in range(50)]
    with socket.create_connection(roll.where[0]) as flood:
        flood.settimeout(5)
        try:
            for _ in range(100):
                flood.sendall(b"x" * (1 << 16))
        except OSError:
            pass  # it was hung up on
    roll.come(caller(1))
    assert refusals(roll.end()) == ["", ""]
    for connection in silent:
        connection.close()
    roll.call.close()


def test_whoever_is_told_to_no_longer_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(sentence: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("distloop.transports.roll_call.NOTICE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        call = RollCall(caller(0), [listener], STORE, 0.6, gone)
        assert "rank 1 of 2 did not come" in call.hold().refused
        call.close()


def test_a_roll_call_that_breaks_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*callers: Any) -> str:
        raise MemoryError("no more")

    monkeypatch.setattr(RollCall, "_serve", broken)
    call = RollCall(caller(0), [], STORE, 600.0, print)
    assert call.hold().refused == "rank 0 could not call the roll: no more"


def test_an_address_that_was_is_asked_for_again() -> None:
    """The store of an agent may still say where an earlier rank 0 was."""
    with rolled() as roll, socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()
        closed.close()
        answers = [[nobody], [nobody], roll.where]
        where = lambda: answers.pop(0) if len(answers) > 1 else answers[0]  # noqa: E731
        assert introduce(caller(1), where, 5.0, print, sure=False) == Verdict(store=STORE)


def test_rank_0_answers_at_all_addresses_of_its_name() -> None:
    listeners = [socket.create_server((f"127.0.0.{i}", 0)) for i in (1, 2)]
    call = RollCall(caller(0, 3), listeners, STORE, 10.0, print)
    heard: list[Verdict] = []
    others = [
        threading.Thread(
            target=lambda one=one, rank=rank: heard.append(
                introduce(caller(rank, 3), lambda: [one.getsockname()], 5.0, print)
            )
        )
        for rank, one in enumerate(listeners, 1)
    ]
    for other in others:
        other.start()
    assert call.hold() == Verdict(store=STORE)
    for other in others:
        other.join(5)
    call.close()
    assert heard == [Verdict(store=STORE)] * 2
