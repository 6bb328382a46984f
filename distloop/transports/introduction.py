"""A rank's side of the roll call, and what is said in it: lines of JSON over TCP."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from distloop.errors import RankDiedError, WorldError, by_exit_code
from distloop.transports.addresses import listener

LONGEST = 1 << 20  # bytes of a line
ANSWER = 8.0  # seconds that whoever listens has to answer, and a caller to say who it is
NOTICE = 10.0  # seconds of waiting after which, and between which, the user hears for whom
PROTOCOL = 1
HINT = "is it started, on that host, and may connections pass?"
ADVICE = "give one of the two jobs another MASTER_PORT"


@dataclass(frozen=True)
class Caller:
    """What a rank says of itself."""

    rank: int
    size: int
    job: str
    host: str
    pid: int
    place: str  # tells hosts apart
    address: str  # at which other hosts reach it
    facts: Mapping[str, Any] = field(default_factory=dict)  # what must be the same on all ranks

    @property
    def name(self) -> str:
        """Rank, process and host in words."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass(frozen=True)
class Verdict:
    """What rank 0 answers: where the ranks meet next, or why they do not."""

    store: str = ""  # host and port, with a blank between
    refused: str = ""
    exit_code: int = 3
    elsewhere: bool = False  # another job answers here: this one's may be at another port
    alone: bool = False  # the caller alone is refused

    def check(self) -> Verdict:
        """Raise what was refused."""
        if self.refused:
            raise by_exit_code(self.exit_code)(self.refused, everywhere=not self.alone)
        return self


def who_this_is(rank: int, size: int, job: str, place: str, address: str, facts: Mapping[str, Any]) -> Caller:
    """Return what this process says of itself."""
    return Caller(rank, size, job, socket.gethostname(), os.getpid(), place, address, facts)


def introduce(
    own: Caller,
    where: Callable[[], Sequence[tuple[str, int]]],
    timeout: float,
    say: Callable[[str], None],
    *,
    sure: bool = True,
    everywhere: bool = False,
    hint: str = HINT,
) -> Verdict:
    """Tell rank 0 who this is; return its verdict.

    Args:
        own: this rank.
        where: returns the addresses and ports at which rank 0 may answer; asked again as long as it does not.
        timeout: seconds for rank 0 to answer, and then for all ranks to come.
        say: tells the user a sentence.
        sure: nobody but rank 0 has a right to be there, so whoever else answers is an error at once.
        everywhere: the ranks of a host are known, so that one of them need say that rank 0 cannot be reached.
        hint: what to look at if rank 0 cannot be reached.

    Raises:
        WorldError: rank 0 does not answer, another does, or the run cannot begin.
        RankDiedError: rank 0 ended before all ranks had come.
    """
    deadline, notice = time.monotonic() + timeout, time.monotonic() + NOTICE
    while True:
        tried = where()
        try:
            verdict, reason = _ask_each(own, tried, deadline, sure=sure)
        except _StrangerError as failure:
            raise WorldError(str(failure), everywhere=everywhere) from None
        if verdict is not None:
            return verdict.check()
        shown, now = " or ".join(f"{host}:{port}" for host, port in tried), time.monotonic()
        if now >= deadline:
            raise WorldError(
                f"rank {own.rank} of {own.size} could not reach rank 0 at {shown} within {timeout:g} s: {reason}; "
                f"{hint}",
                everywhere=everywhere,
            )
        if now >= notice:
            say(f"rank {own.rank} has not reached rank 0 at {shown} for {NOTICE:g} s: {reason}")
            notice = now + NOTICE
        time.sleep(0.05)


def _ask_each(
    own: Caller, where: Sequence[tuple[str, int]], deadline: float, *, sure: bool
) -> tuple[Verdict | None, str]:
    """Return the verdict of the first at which rank 0 answers, or why nobody does."""
    reasons = []
    for host, port in where:
        try:
            return _ask(own, host, port, deadline), ""
        except OSError as failure:
            reasons.append((failure.strerror or str(failure) or "no answer").lower())
        except _StrangerError as failure:
            if sure:
                raise
            reasons.append(str(failure))
    return None, "; ".join(dict.fromkeys(reasons))


def whose(address: str, port: int) -> str:
    """Return in words whose port this is, that cannot be had."""
    stranger = Caller(-1, 0, "", "", 0, "", "")
    try:
        _ask(stranger, address, port, time.monotonic() + 2.0, 2.0)
    except _StrangerError as failure:
        if (told := str(failure).partition(" ")[2]).startswith("belongs to"):
            return told
    except (OSError, RankDiedError):
        pass
    owner = listener(port) or "another program"
    return f"is in use by {owner}: set MASTER_PORT to a free port of rank 0's host"


class _StrangerError(Exception):
    """Somebody listens there, who is not rank 0 of this job."""


def _ask(own: Caller, host: str, port: int, deadline: float, patience: float | None = None) -> Verdict:
    """Return rank 0's verdict, when all ranks have come.

    Raises:
        OSError: nobody can be reached.
        _StrangerError: somebody else, as it says or by what it does.
        RankDiedError: rank 0 ended while it was waited for.
    """
    timeout = max(0.1, min(5.0, deadline - time.monotonic()))
    with socket.create_connection((host, port), timeout) as connection, connection.makefile("rb") as lines:
        heard = False
        connection.settimeout(ANSWER if patience is None else patience)
        try:
            connection.sendall(line({"distloop": PROTOCOL} | asdict(own)))
            answer = _read(lines.readline(LONGEST))
            if heard := "here" in answer:
                # Rank 0 decides at its own deadline, which is later than this rank's by what it began later.
                connection.settimeout(max(deadline - time.monotonic(), 0.0) + 60.0)
                answer = _read(lines.readline(LONGEST))
            verdict = _verdict(answer)
            if verdict.elsewhere:
                raise _StrangerError(f"{host}:{port} {verdict.refused}: {ADVICE}")
            return verdict
        except (TimeoutError, ConnectionResetError, BrokenPipeError, EOFError) as failure:
            if heard:
                raise RankDiedError(f"rank 0 (on {host}) ended before all ranks had come", everywhere=True) from failure
            if not isinstance(failure, TimeoutError):
                raise ConnectionResetError("it closes the connection") from failure
            reason = "says nothing"
        except (ValueError, KeyError, TypeError):
            reason = "speaks otherwise"
    raise _StrangerError(f"{host}:{port} is not rank 0 of a run of distloop: what listens there {reason}; {ADVICE}")


def _verdict(answer: Mapping[str, Any]) -> Verdict:
    found = {name: answer[name] for name in Verdict.__dataclass_fields__}
    if any(type(value) is not type(getattr(Verdict(), name)) for name, value in found.items()):
        raise TypeError("not a verdict")
    return Verdict(**found)


def read_caller(sent: bytes) -> Caller:
    """Return who has sent this line.

    Raises:
        ValueError, KeyError, TypeError, EOFError: it is not of this protocol.
    """
    found = _read(sent)
    if found["distloop"] != PROTOCOL:
        raise ValueError("another protocol")
    caller = Caller(**{key: found[key] for key in Caller.__dataclass_fields__})
    for text in (caller.job, caller.host, caller.place, caller.address):
        if not isinstance(text, str):
            raise TypeError("not a text")
    if not isinstance(caller.facts, dict) or not all(type(n) is int for n in (caller.rank, caller.size, caller.pid)):
        raise TypeError("not a number")
    return caller


def _read(line: bytes) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        if len(line) >= LONGEST:
            raise ValueError("too long")
        raise EOFError
    try:
        found = json.loads(line)
    except RecursionError as failure:
        raise ValueError("too deep") from failure
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
