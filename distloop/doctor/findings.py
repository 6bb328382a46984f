"""What a check finds, and checks that cannot hang or break the others."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from distloop.errors import DistloopError
from distloop.world import World

if TYPE_CHECKING:
    from distloop.config import Config


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
        return replace(cls(**{**told, "level": Level(told["level"])}))  # type: ignore[arg-type]


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


@dataclass
class _Answer:
    findings: list[Finding] = field(default_factory=list)
    failure: BaseException | None = None


def bounded(work: Callable[[], Found], seconds: float, name: str) -> list[Finding]:
    """Return what ``work`` finds; that it breaks, or has not ended after so many seconds, is a finding too."""
    answer = _Answer()

    def look() -> None:
        try:
            found = work()
            answer.findings = [found] if isinstance(found, Finding) else list(found)
        except BaseException as failure:
            answer.failure = failure

    thread = threading.Thread(target=look, daemon=True, name=f"doctor: {name}")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [failed(name, f"did not end within {seconds:g} s", "see what it waits for: py-spy dump, or strace")]
    if answer.failure is not None:
        return [failed(name, in_words(answer.failure))]
    return answer.findings


def in_words(failure: BaseException) -> str:
    """Return an exception as one clause."""
    text = " ".join(str(failure).split())[:500] or "no reason given"
    return text if isinstance(failure, DistloopError) else f"{type(failure).__name__}: {text}"


def ok(check: str, found: Any) -> Finding:
    return Finding(check, Level.OK, str(found))


def warning(check: str, found: Any, advice: str = "") -> Finding:
    return Finding(check, Level.WARNING, str(found), advice)


def failed(check: str, found: Any, advice: str = "") -> Finding:
    return Finding(check, Level.FAILED, str(found), advice)
