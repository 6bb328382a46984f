"""The thread that talks to the store: it says that this rank lives, and hears of the others."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass

from torch.distributed.distributed_c10d import Store

from distloop.transports import meeting

ABORT = "abort"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends: what the first rank found that failed, or that found a failure."""

    rank: int
    exit_code: int
    sentence: str

    @classmethod
    def read(cls, text: str) -> Verdict:
        values = json.loads(text)
        return cls(int(values["rank"]), int(values["exit_code"]), str(values["sentence"]))


@dataclass
class Peer:
    """What is known of another rank."""

    host: str
    pid: int
    here: bool  # on this host
    beat: int = 0
    step: int = 0
    silence: float = 0.0  # seconds in which the store answered and the beat stayed what it was


class Pulse:
    """Beats, and keeps what the store says. Others read its attributes; only its thread waits for the store.

    Time in which this process did not run does not count: the others may have been suspended with it.
    """

    def __init__(self, rank: int, peers: dict[int, Peer], beat: float, poll: float):
        self.rank, self.step = rank, 0
        self.peers = peers
        self.finished: set[int] = set()
        self.abort: str | None = None
        self.rounds = 0  # that the store has answered
        self.lost: str | None = None  # why there is no store any more
        self.suspects: set[int] = set()  # of whom it is asked whether they have finished
        self.beat, self._poll = beat, poll
        self._wake, self._ended = threading.Event(), False
        self._silent = False
        self._beats = 0
        self._beaten = self._read = -1.0e9
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def hurry(self) -> None:
        """Have it ask again at once."""
        self._wake.set()

    def end(self) -> None:
        """Say that this rank has finished, and talk no more."""
        self._ended = True
        self._wake.set()

    def stop(self) -> None:
        """Talk no more."""
        self._silent = True
        self.end()

    def _run(self) -> None:
        try:
            store = meeting.another_connection()
            if store is None:
                return
            while not self._ended:
                self._round(store)
                self.rounds += 1
                self._wake.wait(self._poll)
                self._wake.clear()
            if self._silent:
                return
            store.set(f"finished/{self.rank}", "")
            store.check([ABORT])  # has an answer, so the store knows what was set before
        except RuntimeError as failure:  # torch.distributed's errors are
            self.lost = (str(failure).splitlines() or ["no reason given"])[0]

    def _round(self, store: Store) -> None:
        now = time.monotonic()
        if now - self._beaten >= self.beat:
            self._beats, self._beaten = self._beats + 1, now
            store.set(f"beat/{self.rank}", f"{self._beats} {self.step}")
        if self.abort is None and store.check([ABORT]):
            self.abort = store.get(ABORT).decode()
        silent = {rank for rank, peer in self.peers.items() if peer.silence > 2 * self.beat}
        for rank in (self.suspects | silent) - self.finished:
            if store.check([f"finished/{rank}"]):
                self.finished.add(rank)
        if now - self._read >= self.beat:
            since, self._read = now - self._read, now
            self._hear(store, min(since, 2 * self.beat))

    def _begun(self, store: Store, rank: int) -> bool:
        return bool(store.check([f"beat/{rank}"]))

    def _hear(self, store: Store, since: float) -> None:
        """Read the beats of the others."""
        ranks = [r for r, peer in self.peers.items() if r not in self.finished and (peer.beat or self._begun(store, r))]
        for rank, value in zip(ranks, store.multi_get([f"beat/{r}" for r in ranks]) if ranks else [], strict=True):
            peer, (beat, step) = self.peers[rank], map(int, value.split())
            peer.silence = peer.silence + since if beat == peer.beat else 0.0
            peer.beat, peer.step = beat, step
