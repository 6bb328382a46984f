"""A heartbeat beside the collectives: who has died, stands still or has failed is known to all ranks soon, by name.

Every rank has a thread that tells the others, through the store by which ranks met, that it lives and at which step it
is, over a connection of its own. A second thread watches: the processes of this host (which end), the beats of the
others (which stop where a process is frozen, or native code holds its interpreter), the store itself, the launcher, and
what the first rank that failed has posted. Where the main thread does not end by itself soon after such news, because
it computes or waits in a collective, the second thread ends the process.

In small worlds all watch all; in large ones all watch rank 0 and their neighbours, and rank 0 watches all.

There is none for a world of one rank, for ranks that are threads, and for ranks that met by MPI, which has no store;
mpirun itself ends the ranks of a job with the first that fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import torch

from distloop.errors import DistloopError
from distloop.heartbeat.pulse import ABORT, Peer, Pulse, Verdict
from distloop.heartbeat.watch import Watch
from distloop.messages import gather_json
from distloop.transports import Transport, meeting
from distloop.transports.hosts import host
from distloop.world import World

BEAT = 1.0  # seconds between two beats
ALL = 16  # ranks that all watch all of


class SecondaryError(DistloopError):
    """Another rank has failed before this one, and says why."""

    def __init__(self, verdict: Verdict):
        super().__init__(f"rank {verdict.rank} has ended the run: {verdict.sentence}")
        self.exit_code = verdict.exit_code


class Heartbeat:
    """The part of this rank; at most one in a process.

    Attributes:
        logs: where stacks are dumped when a rank hangs; nowhere, while it is not known.
        speak: reports a verdict of this rank whose main thread does not.
    """

    speak: ClassVar[Callable[[Verdict], None] | None] = None
    _current: ClassVar[Heartbeat | None] = None

    def __init__(self, world: World, transport: Transport, seconds: float, beat: float):
        self.rank, self.size = transport.rank, transport.size
        self.logs: Path | None = None
        self.verdict: Verdict | None = None
        self.failing = threading.Event()  # the main thread reports a failure, and is about to end
        self._pulse = Pulse(self.rank, _peers(transport), beat, min(0.25, beat))
        self._watch = Watch(self, self._pulse, seconds, world)

    @classmethod
    def begin(
        cls, world: World, transport: Transport, seconds: float | None = None, *, beat: float | None = None
    ) -> Heartbeat | None:
        """Begin to beat and to watch; None where there is none. Every rank calls it at the same time.

        Args:
            world: this process's place.
            transport: by which the ranks have met.
            seconds: of silence after which a rank counts as frozen (None: 10 on CPUs, 60 with GPUs; 0: no heartbeat).
            beat: seconds between two beats (None: 1, or less if ``seconds`` are few).
        """
        if seconds is None:
            seconds = 60.0 if torch.cuda.is_available() else 10.0
        if seconds == 0 or transport.size == 1 or not meeting.has_met():
            return None
        cls._current = cls(world, transport, seconds, min(BEAT, seconds / 5) if beat is None else beat)
        cls._current._pulse.thread.start()
        cls._current._watch.thread.start()
        return cls._current

    @classmethod
    def current(cls) -> Heartbeat | None:
        """Return this process's, if there is one."""
        return cls._current

    def step(self, number: int) -> None:
        """Note the step that the rank is at.

        Raises:
            SecondaryError: another rank has ended the run.
        """
        self._pulse.step = number
        if self.verdict is not None and self.verdict.rank != self.rank:
            raise SecondaryError(self.verdict)

    @property
    def at_step(self) -> int:
        """The step that was noted last."""
        return self._pulse.step

    def post(self, exit_code: int, sentence: str) -> Verdict:
        """Tell all ranks why this one ends; return why the run ends, which is another's reason if that came first.

        The main thread calls it, reports what is to be reported, and leaves.
        """
        self.failing.set()
        return self.agree(exit_code, sentence)

    def agree(self, exit_code: int, sentence: str) -> Verdict:
        """Return the reason that came first. Without a store to ask, it is the lowest rank of this host that speaks."""
        if self.verdict is None:
            own = Verdict(self.rank, exit_code, sentence)
            found = meeting.post(ABORT, json.dumps(asdict(own)))
            try:
                self.verdict = Verdict.read(found) if found else self._watch.cut_off(own)
            except (ValueError, KeyError):
                self.verdict = own
        return self.verdict

    def report(self, verdict: Verdict) -> None:
        """Say to the user what this rank has found, in place of its main thread."""
        if (speak := Heartbeat.speak) is not None:
            speak(verdict)

    def fate(self, seconds: float, longer: float) -> str | None:
        """Return in words what became of a rank of this host that has ended; waits ``seconds`` for that to show.

        If none has, a connection was lost for another reason, and it may be known to another rank: wait ``longer`` for
        what that one posts. Who gives up waiting for a frozen rank closes its connections to the others. A rank of
        another host shows by its beats that it has ended: wait for some of them.
        """
        self.failing.set()
        found = self._watch.fate(seconds)
        deadline = time.monotonic() + max(longer, self._watch.notice)
        while found is None and self._pulse.abort is None and time.monotonic() < deadline:
            time.sleep(0.02)
            found = self._watch.absent() or self._watch.without_store()
        return found

    def end(self) -> None:
        """Finish: what others do from now on is no business of this rank, nor its end a failure to them."""
        Heartbeat._current = None
        self._watch.end()
        self._pulse.end()
        self._pulse.thread.join(2.0)

    def abandon(self) -> None:
        """Stop after a failure that was posted; the process may go on."""
        self._watch.end()
        self._pulse.stop()


def _peers(transport: Transport) -> dict[int, Peer]:
    """Return those whom this rank watches; every rank calls it."""
    own = [hashlib.sha256(host().encode()).hexdigest()[:16], socket.gethostname(), os.getpid()]
    every = gather_json(transport, own)
    return {
        rank: Peer(name, pid, place == own[0])
        for rank, (place, name, pid) in enumerate(every)
        if rank in _watched(transport.rank, transport.size)
    }


def _watched(rank: int, size: int) -> list[int]:
    if size <= ALL or rank == 0:
        return [other for other in range(size) if other != rank]
    return sorted({0, rank - 1, (rank + 1) % size} - {rank})


def _in_child() -> None:
    Heartbeat._current = None  # threads do not live on in a forked process


os.register_at_fork(after_in_child=_in_child)
