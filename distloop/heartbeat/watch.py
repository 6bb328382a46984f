"""The thread that never waits for anyone but processes: it decides that a rank has died or stands still, and ends."""

from __future__ import annotations

import faulthandler
import os
import select
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from distloop.ending import leave
from distloop.errors import TERMINATED, RankDiedError, RankHungError
from distloop.heartbeat.processes import Process
from distloop.heartbeat.pulse import Pulse, Verdict
from distloop.memory_limit import MemoryLimit
from distloop.orphans import Launcher, has_launcher
from distloop.transports import meeting
from distloop.world import World

if TYPE_CHECKING:
    from distloop.heartbeat import Heartbeat

TICK = 0.2  # seconds
PATIENCE = 0.5  # for which the main thread may end by itself, or begin to
REPORTING = 5.0  # for which it may go on with that


class Watch:
    """Watches processes, beats, the store and the launcher of a heartbeat."""

    def __init__(self, heartbeat: Heartbeat, pulse: Pulse, seconds: float, world: World):
        self._own, self._pulse, self._seconds = heartbeat, pulse, seconds
        self._launcher = Launcher() if has_launcher() else None
        self._in_launcher = meeting.store_in_launcher()
        self._local_rank = world.local_rank
        self._memory = MemoryLimit()
        self._processes: dict[int, Process] = {}
        self._dead: dict[int, float] = {}  # when it was seen
        self._poll = select.poll()
        for rank, peer in pulse.peers.items():
            with suppress(OSError, AttributeError):
                if peer.here:
                    self._processes[rank] = process = Process(peer.pid)
                    self._poll.register(process.handle, select.POLLIN)
        self._rounds, self._unanswered, self._last = -1, 0.0, time.monotonic()
        self._ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def end(self) -> None:
        self._ended.set()

    def fate(self, seconds: float) -> str | None:
        """Return in words what became of the first that died, waiting for that to show."""
        deadline = time.monotonic() + seconds
        while not self._dead and time.monotonic() < deadline and self._processes:
            time.sleep(0.01)
        return next((self._story(rank) for rank in list(self._dead)), None)

    @property
    def notice(self) -> float:
        """Seconds after which a rank of another host that has ended is known by its silence; 0 if there is none."""
        return 5 * self._pulse.beat if len(self._processes) < len(self._pulse.peers) else 0.0

    def absent(self) -> str | None:
        """Return in words which rank of another host has missed beats, where it is known that one is gone."""
        for rank, peer in self._pulse.peers.items():
            if not peer.here and rank not in self._pulse.finished and peer.silence >= 2 * self._pulse.beat:
                return f"rank {rank} has not been heard from for {peer.silence:.1f} s{self._at(rank)}"
        return None

    def without_store(self) -> str | None:
        """Return in words that who keeps the store cannot be reached any more, if so."""
        if self._pulse.lost is None:
            return None
        return f"{self._keeper()} has ended or cannot be reached{'' if self._in_launcher else self._at(0)}"

    def _keeper(self) -> str:
        if self._in_launcher:
            return f"the launcher on {os.environ.get('MASTER_ADDR')}, which keeps the store of these ranks,"
        return "rank 0, which keeps their store,"

    def cut_off(self, verdict: Verdict) -> Verdict:
        """Return the verdict as of the rank that speaks on this host, where ranks cannot ask each other who does."""
        here = [rank for rank in self._processes if rank not in self._dead]
        if not self._in_launcher and 0 in here:
            here.remove(0)  # it keeps the store that does not answer
        return Verdict(min([verdict.rank, *here]), verdict.exit_code, verdict.sentence)

    def _run(self) -> None:
        while not self._ended.is_set():
            self._wait()
            if self._ended.is_set():
                break
            if self._launcher is not None and self._launcher.is_gone():
                leave(TERMINATED)
            self._look()
        for process in self._processes.values():
            process.close()

    def _wait(self) -> None:
        """Wait for a moment, or until a process ends."""
        if not self._processes:
            self._ended.wait(TICK)
            return
        ended = {handle for handle, _ in self._poll.poll(TICK * 1000)}
        for rank, process in self._processes.items():
            if process.handle in ended and rank not in self._dead:
                self._poll.unregister(process.handle)
                self._dead[rank] = time.monotonic()
                self._pulse.suspects.add(rank)
                self._pulse.hurry()

    def _look(self) -> None:
        """End, if there is a reason to."""
        now = time.monotonic()
        awake, self._last = min(now - self._last, 2 * TICK), now
        pulse = self._pulse
        self._unanswered = self._unanswered + awake if pulse.rounds == self._rounds else 0.0
        self._rounds = pulse.rounds
        if pulse.abort is not None:
            self._own.verdict = self._own.verdict or Verdict.read(pulse.abort)
            self._end()
        for rank, when in self._dead.items():
            # The store is asked first whether it had finished, or has said why it ends.
            if rank not in pulse.finished and now - when > 0.2:
                self._fail(RankDiedError.exit_code, f"{self._story(rank)}{self._at(rank)}")
        silent = [r for r, p in pulse.peers.items() if p.silence > self._seconds and r not in pulse.finished]
        if silent:
            self._fail(RankHungError.exit_code, self._frozen(silent), frozen=silent)
        if pulse.lost is not None or self._unanswered > self._seconds:
            self._without_store(pulse.lost)

    def _without_store(self, reason: str | None) -> None:
        who = self._keeper()
        if reason is not None:
            self._fail(RankDiedError.exit_code, f"{who} has ended, or cannot be reached ({reason})")
        if self._in_launcher and self._launcher is not None and self._stands_still(self._launcher.pid):
            return  # the user has stopped it, as Ctrl-Z does; ranks go on
        state = "" if self._in_launcher or 0 not in self._processes else f": {self._processes[0].state()}"
        self._fail(
            RankHungError.exit_code, f"{who} has not answered for {self._seconds:g} s{state}{self._at(0)}", frozen=[0]
        )

    def _stands_still(self, pid: int) -> bool:
        with suppress(OSError):
            process = Process(pid)
            try:
                return "stopped" in process.state()
            finally:
                process.close()
        return False

    def _story(self, rank: int) -> str:
        """Return in words how a rank of this host ended."""
        ending = self._processes[rank].ending() or "has ended"
        limit = self._memory.has_killed() if "signal 9" in ending or ending == "has ended" else None
        return f"rank {rank} " + (f"was killed by {limit}" if limit is not None else ending)

    def _at(self, rank: int) -> str:
        peer = self._pulse.peers.get(rank)
        return f", at step {peer.step} or later, on {peer.host} (process {peer.pid})" if peer is not None else ""

    def _frozen(self, ranks: list[int]) -> str:
        def one(rank: int) -> str:
            process = self._processes.get(rank)
            state = "it, its host or the network stands still" if process is None else process.state()
            return f"rank {rank} has not been heard from for {self._seconds:g} s{self._at(rank)}: {state}"

        return "; ".join(map(one, ranks))

    def _fail(self, code: int, sentence: str, frozen: Sequence[int] = ()) -> None:
        """Tell all what this rank has found, unless another came first, and end with it."""
        self._own.agree(code, sentence)
        self._end(frozen)

    def _end(self, frozen: Sequence[int] = ()) -> None:
        """Leave the main thread a while to end by itself, then end the process."""
        verdict = self._own.verdict
        assert verdict is not None
        if verdict.exit_code == RankHungError.exit_code:
            self._dump()
        reported = self._own.failing.wait(PATIENCE)
        if self._ended.wait(REPORTING + self.notice if reported else 0):
            return
        if verdict.rank == self._own.rank and not reported:
            self._own.report(verdict)
        for rank in frozen:
            if rank in self._processes and rank not in self._dead:
                self._processes[rank].kill()  # it would hold its port, its memory and its GPU
        leave(verdict.exit_code)

    def _dump(self) -> None:
        """Leave where every thread of this process is in a file beside the log."""
        if self._own.logs is None:
            return
        with suppress(OSError), (self._own.logs / f"stacks-rank{self._own.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            os.fsync(file.fileno())
