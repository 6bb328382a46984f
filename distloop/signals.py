"""Signals that ask a process to stop: the first is a question, the second an order, also to a main thread that hangs.

Python calls a signal's handler in the main thread, between two lines of Python. A main thread that waits in C++ for
another rank never gets there. So the interpreter also writes each signal's number into a pipe, at once, and a thread
reads it: where the main thread has not ended a while after the order, this one ends the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

from distloop.ending import leave

ENDING = (signal.SIGINT, signal.SIGTERM)
ASKING = (signal.SIGUSR1, signal.SIGUSR2)
AGENT = "LAUNCHED_BY_DISTLOOP"  # the environment variable that holds the process id of distloop's own agent
PATIENCE = 1.0  # seconds from the order for which the main thread may end by itself


class Terminated(SystemExit):
    """The second SIGTERM, as KeyboardInterrupt is the second Ctrl-C."""


class Caught:
    """While entered, the first signal that asks for a stop calls ``ask`` with its number, and the second one ends.

    SIGUSR1 and SIGUSR2 ask, and never end; those that come without ``ask`` are for who is entered next with it. Without
    ``ask`` the first of the others ends; but once another that asks was entered within and has ended well, what the
    process was to do is done: a signal that comes too late for that is borne, or it would end one rank otherwise than
    the others, and the second one ends. Does nothing in threads other than the main one: whoever owns the process owns
    its signals.

    Args:
        ask: called in the main thread, and in another one; only sets a flag.
        patience: seconds for which the main thread may end by itself, by KeyboardInterrupt or Terminated.
    """

    def __init__(self, ask: Callable[[int], None] | None, patience: float = PATIENCE):
        self._ask, self._patience = ask, patience
        self._before: dict[int, object] = {}
        self._orders = self._orders_told = 0 if ask is not None else 1  # that the main thread has seen, and the other
        self._bears = False
        self._early: list[int] = []  # that asked before there was anybody to ask
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1
        self._thread: threading.Thread | None = None
        self._last: threading.Timer | None = None  # ends the process

    def __enter__(self) -> Caught:
        try:
            for number in (*ENDING, *ASKING):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:
            return self  # not the main thread
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, end == self._pipe[0])
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True)
        self._thread.start()
        if (ask := self._ask) is not None:
            for outer in _entered:
                while outer._early:
                    ask(outer._early.pop())
        _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is None:
            return
        if self._bears and kind is not None and issubclass(kind, SystemExit):
            return  # to the end of the process
        _entered.remove(self)
        if self._ask is not None and kind is None and _entered:
            self._before |= _entered[-1]._bear({number: self._before[number] for number in ASKING})
        signal.set_wakeup_fd(self._wakeup_before, warn_on_full_buffer=False)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._before.clear()
        os.write(self._pipe[1], b"\0")  # no signal has this number: the thread is to end
        assert self._thread is not None
        self._thread.join(PATIENCE)
        if self._last is not None:
            self._last.cancel()  # the main thread has come here, so it does not hang
        self._close()

    def _bear(self, before: dict[int, object]) -> dict[int, object]:
        """Let the first signal from now on do nothing; take over some, and return what is to handle those."""
        self._orders, self._orders_told, self._bears = 0, 0, True
        self._before = before | self._before
        return dict.fromkeys(before, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in ENDING and not self._never_ends():
            self._orders += 1
            if self._orders > 1 and self._ask is None:
                leave(128 + number)
            if self._orders > 1 and number == signal.SIGINT:
                raise KeyboardInterrupt
            if self._orders > 1:
                raise Terminated(128 + number)
        if self._ask is not None:
            self._ask(number)
        elif number in ASKING:
            self._early.append(number)

    def _watch(self, pipe: int) -> None:
        """Read the numbers of signals; after the order, end the process unless it ends by itself."""
        while True:
            for number in os.read(pipe, 64):
                if number == 0:
                    return
                ends = number in ENDING and not self._never_ends()
                self._orders_told += ends
                if self._orders_told > 1 and ends:
                    self._last = threading.Timer(self._patience, leave, (128 + number,))
                    self._last.daemon = True
                    self._last.start()
                elif self._ask is not None and number in (*ENDING, *ASKING):
                    self._ask(number)

    def _never_ends(self) -> bool:
        """Return whether every signal is a question: distloop's agent knows the second one, and kills.

        A scheduler may signal all processes of a job, so that one comes from it and one from the agent.
        """
        return (self._ask is not None or self._bears) and os.environ.get(AGENT) == str(os.getppid())

    def _close(self) -> None:
        for end in self._pipe or ():
            os.close(end)
        self._pipe = None


_entered: list[Caught] = []


def _in_child() -> None:
    """Leave the parent's pipe alone in a forked process, as a worker is; it ends with its parent, not before it.

    Ctrl-C goes to all processes of a terminal, and a scheduler's warning may go to all of a job. A worker that ended at
    once would take the agreed stop's batches along.
    """
    if not _entered:
        return
    with suppress(ValueError):  # forked by another thread than the main one
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGINT, *ASKING):
            signal.signal(number, signal.SIG_IGN)
    for caught in _entered:
        caught._close()
    _entered.clear()


os.register_at_fork(after_in_child=_in_child)
