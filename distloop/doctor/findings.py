"""What a check finds, and checks that cannot hang or break the others."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from distloop.errors import DistloopError
from distloop.world import World

if TYPE_CHECKING:
    from distloop.config import Config


Result = TypeVar("Result")
THREADS = "doctor:"


class Level(enum.StrEnum):
    """How bad a finding is; only ``FAILED`` makes the exit code 3."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it."""

    check: str
    level: Level
    found: str
    advice: str = ""
    host: str = ""  # where it is not the host of who tells

    def as_json(self) -> dict[str, str]:
        told = {"check": self.check, "level": str(self.level), "found": self.found, "advice": self.advice}
        return told | ({"host": self.host} if self.host else {})

    @classmethod
    def from_json(cls, told: dict[str, str]) -> Finding:
        return cls(**{**told, "level": Level(told["level"])})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Context:
    """What is examined: this process's place, and what a run with these settings would use."""

    world: World
    config: Config
    target: tuple[str, ...] = ()  # as it was given on the command line, for ranks of the doctor's own

    @property
    def several_hosts(self) -> bool:
        return not self.world.single_host


Found = Finding | Iterable[Finding]


@dataclass(frozen=True)
class Check:
    """Looks at one thing on this host; ``seconds`` is what it may take."""

    area: str
    name: str
    look: Callable[[Context], Found]
    seconds: float = 10.0


def bounded(work: Callable[[], Found], seconds: float, name: str) -> list[Finding]:
    """Return what ``work`` finds; that it breaks, or has not ended after so many seconds, is a finding too."""

    def look() -> list[Finding]:
        found = work()
        return [found] if isinstance(found, Finding) else list(found)

    try:
        return Pending(look, name).wait(seconds)
    except TimeoutError as failure:
        return [failed(name, failure, "see what it waits for: py-spy dump, or strace")]
    except Exception as failure:
        return [failed(name, in_words(failure))]


class Pending(Generic[Result]):
    """Work that a thread does meanwhile."""

    def __init__(self, work: Callable[[], Result], name: str):
        self._results: list[Result] = []
        self._failures: list[BaseException] = []

        def do() -> None:
            try:
                self._results.append(work())
            except BaseException as failure:
                self._failures.append(failure)

        self._begun = time.monotonic()
        self._thread = threading.Thread(target=do, daemon=True, name=f"{THREADS} {name}")
        self._thread.start()

    def wait(self, seconds: float) -> Result:
        """Return what the work does, or raise what it raises.

        Raises:
            TimeoutError: it has not ended so many seconds after it began; its thread goes on.
        """
        self._thread.join(max(0.0, self._begun + seconds - time.monotonic()))
        if self._failures:
            raise self._failures[0]
        if not self._results:
            raise TimeoutError(f"did not end within {seconds:g} s")
        return self._results[0]


def hanging() -> bool:
    """Return whether the work of a check has not ended yet."""
    return any(thread.name.startswith(THREADS) for thread in threading.enumerate())


def in_words(failure: BaseException) -> str:
    """Return an exception as one clause."""
    text = " ".join(str(failure).split())[:500] or "no reason given"
    return text if isinstance(failure, DistloopError | TimeoutError) else f"{type(failure).__name__}: {text}"


def ok(check: str, found: Any) -> Finding:
    return Finding(check, Level.OK, str(found))


def warning(check: str, found: Any, advice: str = "") -> Finding:
    return Finding(check, Level.WARNING, str(found), advice)


def failed(check: str, found: Any, advice: str = "") -> Finding:
    return Finding(check, Level.FAILED, str(found), advice)
