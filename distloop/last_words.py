"""What is left of a run that failed: one block at the end of what it said, and failure.json."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from distloop.errors import DistloopError, RankDiedError, RankHungError
from distloop.heartbeat import Heartbeat
from distloop.heartbeat.pulse import Verdict
from distloop.world import World

SENTENCE = 8  # lines, at most; the block has up to three more
NEXT = {
    10: "find out why that rank ended, then start the run again; torchrun --max-restarts does so by itself",
    11: "look at that rank's host, and at the stacks in logs; world.heartbeat and world.timeout say how long to wait",
    12: "start the run again from a checkpoint made before; if the same host is named again, leave it out",
    13: "start the run again with what the sentence advises, from a checkpoint made before",
    21: "make room, or set log.directory to a place that can be written",
}


@dataclass
class _Known:
    """What of this process's run is known so far."""

    directory: Path | None = None
    attempt: str = "0"


_known = _Known()


def remember(directory: Path, rank: int) -> None:
    """Note the run directory; what an earlier attempt left in it as its failure is kept under another name."""
    _known.directory, _known.attempt = directory, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    heartbeat = Heartbeat.current()
    if heartbeat is not None:
        heartbeat.logs = directory / "logs"
    if rank == 0:
        earlier = directory / "failure.json"
        if earlier.exists():
            earlier.replace(directory / "failure.before.json")


def forget() -> None:
    """Note that the run has ended well."""
    _known.directory = None


def leave_word(failure: BaseException, exit_code: int, trace: Sequence[str] = ()) -> None:
    """Print the block and write the file, if a run was under way; else the sentence alone."""
    if isinstance(failure, DistloopError):
        _leave_word(type(failure).__name__, exit_code, str(failure), trace)
    elif _known.directory is not None:  # its traceback has said what it is
        _leave_word(type(failure).__name__, exit_code, f"{type(failure).__name__}: {failure}", trace)


def leave_verdict(verdict: Verdict) -> None:
    """Do the same for a rank whose main thread cannot."""
    kinds = {kind.exit_code: kind.__name__ for kind in (RankDiedError, RankHungError)}
    _leave_word(kinds.get(verdict.exit_code, "RankDiedError"), verdict.exit_code, verdict.sentence, ())


def _leave_word(kind: str, exit_code: int, sentence: str, trace: Sequence[str]) -> None:
    under_way = _known.directory is not None
    said = [f"distloop: {line}" for line in sentence.splitlines()] or ["distloop: "]
    if under_way:
        if len(said) > SENTENCE:
            said = [*said[: SENTENCE - 1], f"distloop: ... and {len(said) - SENTENCE + 1} lines more"]
        said += _circumstances(kind, exit_code, sentence, trace)
    with suppress(OSError):  # somebody may have closed it
        print("\n".join(said), file=sys.stderr, flush=True)


def _circumstances(kind: str, exit_code: int, sentence: str, trace: Sequence[str]) -> list[str]:
    world, heartbeat = _world(), Heartbeat.current()
    step = None if heartbeat is None else heartbeat.at_step
    record = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "rank": world.rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "kind": kind,
        "exit_code": exit_code,
        "sentence": sentence,
        "step": step,
        "attempt": int(_known.attempt),
        "traceback": [line for part in trace for line in part.splitlines()],
    }
    at = "" if step is None else f", step {step}"
    lines = [f"  where  rank {world.rank} of {world.size} on {record['host']} (process {record['pid']}){at}"]
    if exit_code in NEXT:
        lines.append(f"  next   {NEXT[exit_code]}")
    assert _known.directory is not None
    path = _known.directory / "failure.json"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=2) + "\n")
    except OSError as failure:
        if not isinstance(failure, FileExistsError):
            return [*lines, f"  (failure.json cannot be written: {failure.strerror})"]
    return [*lines, f"  more   {path}"]


def _world() -> World:
    try:
        return World.from_environment()
    except DistloopError:
        return World()


Heartbeat.speak = leave_verdict
