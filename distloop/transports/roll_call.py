"""The roll call: before anything else, every rank tells rank 0 who it is, and hears whether the run can begin.

It speaks lines of JSON over TCP on the master's port, and before torch.distributed does: torch's store does not notice
a stranger on that port, nor another job, nor a rank that is there twice, and waits for a silent one without an end.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from distloop.transports.addresses import is_loopback
from distloop.transports.differences import first_difference
from distloop.transports.introduction import ADVICE, ANSWER, LONGEST, NOTICE, Caller, Verdict, line, read_caller


class RollCall:
    """Rank 0's side: answers on a listening socket, in a thread of its own, as long as the run lasts.

    Whoever comes when the ranks are complete hears who is at this port.

    Args:
        own: rank 0.
        listeners: bound and listening; one for each address at which rank 0 may be looked for.
        store: what the others are told to meet at next.
        timeout: seconds that all ranks have to come.
        say: tells the user a sentence.
    """

    def __init__(
        self, own: Caller, listeners: Sequence[socket.socket], store: str, timeout: float, say: Callable[[str], None]
    ):
        self._own, self._listeners, self._store, self._timeout, self._say = own, listeners, store, timeout, say
        self._here = {own.rank: own}
        self._begun = time.monotonic()
        self._verdict: Verdict | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = threading.Event()
        self._thread = threading.Thread(target=self._run, name="roll call", daemon=True)

    def hold(self) -> Verdict:
        """Wait until all ranks have come; return what they were told."""
        self._thread.start()
        self._told.wait()
        assert self._verdict is not None
        return self._verdict

    def close(self) -> None:
        """Answer no more."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(5.0)
        for listener in self._listeners:
            listener.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as failure:  # nobody is to wait for a thread that is gone
            self._verdict = self._verdict or Verdict(refused=f"rank 0 could not call the roll: {failure}")
        finally:
            self._told.set()

    async def _serve(self) -> None:
        self._loop, self._decided, self._closing = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._waiting: set[asyncio.Task[None] | None] = set()
        servers = [await asyncio.start_server(self._answer, sock=one, limit=LONGEST) for one in self._listeners]
        self._look()
        while self._verdict is None:
            left = self._begun + self._timeout - time.monotonic()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._decided.wait(), min(NOTICE, max(left, 0.0)))
            if self._verdict is None and left <= NOTICE:
                self._decide(Verdict(refused=f"{self._missing()} within {self._timeout:g} s (world.timeout)"))
            elif self._verdict is None:
                with suppress(OSError):  # whoever read this may be gone
                    self._say(f"{self._missing()} after {time.monotonic() - self._begun:.0f} s, of {self._timeout:g}")
        if others := [task for task in self._waiting if task is not None]:
            await asyncio.wait(others, timeout=2.0)  # a rank that refuses ends: the others are to hear why before
        self._told.set()
        await self._closing.wait()
        for server in servers:
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            caller = read_caller(await asyncio.wait_for(reader.readline(), ANSWER))
            if (refusal := self._refusal(caller)) is not None:
                await _write(writer, asdict(refusal))
                return
            await _write(writer, {"here": self._own.job})
            await self._keep(caller, reader, writer)
        except (OSError, ValueError, KeyError, TypeError, TimeoutError):
            pass  # a stranger, or one that left
        finally:
            writer.close()

    async def _keep(self, caller: Caller, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._waiting.add(task := asyncio.current_task())
        try:
            self._here[caller.rank] = caller
            self._look()
            leaving = asyncio.ensure_future(reader.read(1))
            decided = asyncio.ensure_future(self._decided.wait())
            await asyncio.wait({leaving, decided}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            decided.cancel()
            if self._verdict is None:
                self._decide(Verdict(refused=f"{caller.name} ended before all ranks had come", exit_code=10))
            await _write(writer, asdict(self._verdict or Verdict()))
        finally:
            self._waiting.discard(task)

    def _refusal(self, caller: Caller) -> Verdict | None:
        """Return why a caller is none of this run's; what it shows of the run itself decides that."""
        own = self._own
        if caller.job != own.job or caller.rank <= 0:
            return Verdict(refused=f"belongs to {_job(own)}", elsewhere=True, alone=True)
        wrong = ""
        if caller.size != own.size:
            wrong = f"{caller.name} was started as one of {caller.size} ranks, and {own.name} as one of {own.size}"
        elif caller.rank >= own.size:
            wrong = f"{caller.name} is none of the ranks 0 to {own.size - 1} of {own.name}"
        elif caller.rank in self._here:
            wrong = f"rank {caller.rank} is there twice: {self._here[caller.rank].name}, and {caller.name}"
        if not wrong:
            return None
        if self._verdict is None:
            self._decide(Verdict(refused=wrong))
            return self._verdict
        return Verdict(refused=f"{wrong}; the run goes on with those it began with: {ADVICE}", alone=True)

    def _look(self) -> None:
        if len(self._here) == self._own.size and self._verdict is None:
            callers = [self._here[rank] for rank in range(self._own.size)]
            told = first_difference([caller.facts for caller in callers], [caller.name for caller in callers])
            refused = f"ranks differ: {told}" if told else _out_of_reach(callers)
            self._decide(Verdict(refused=refused) if refused else Verdict(store=self._store))

    def _decide(self, verdict: Verdict) -> None:
        self._verdict = self._verdict or verdict
        self._decided.set()

    def _missing(self) -> str:
        missing = [str(rank) for rank in range(self._own.size) if rank not in self._here]
        hosts: dict[str, list[str]] = {}
        for caller in self._here.values():
            hosts.setdefault(caller.host, []).append(str(caller.rank))
        here = "; ".join(f"{', '.join(sorted(ranks, key=int))} on {host}" for host, ranks in hosts.items())
        shown = ", ".join(missing[:16]) + (f" and {len(missing) - 16} more" if len(missing) > 16 else "")
        return f"rank{'s' if len(missing) > 1 else ''} {shown} of {self._own.size} did not come (here: {here})"


def _job(own: Caller) -> str:
    return f"another job{f', {own.job},' if own.job else ''} whose rank 0 is process {own.pid} on {own.host}"


def _out_of_reach(callers: Sequence[Caller]) -> str:
    """Return which rank gave an address that ranks of other hosts cannot reach, if one did."""
    if len({caller.place for caller in callers}) == 1:
        return ""
    wrong = next((caller for caller in callers if is_loopback(caller.address)), None)
    if wrong is None:
        return ""
    return (
        f"{wrong.name} can be reached at {wrong.address} alone, and other ranks are on other hosts: set MASTER_ADDR, "
        "on all ranks, to an address of rank 0's host that the others reach"
    )


async def _write(writer: asyncio.StreamWriter, value: Mapping[str, Any]) -> None:
    writer.write(line(value))
    await writer.drain()
