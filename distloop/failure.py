"""How a rank ends: one sentence by one rank, the exit code that says what kind of failure it was, and no waiting."""

from __future__ import annotations

import atexit
import sys
import time
import traceback as traceback_module
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from distloop.ending import flush, leave
from distloop.errors import INTERRUPTED, TERMINATED, DistloopError, RankDiedError, RankHungError
from distloop.signals import Terminated
from distloop.world import World

PATIENCE = 2.0  # seconds that a rank leaves another to say what both know

if TYPE_CHECKING:
    from distloop.heartbeat import Heartbeat
    from distloop.transports import Transport


def guarded(work: Callable[[], int], *, traceback: bool = False) -> NoReturn:
    """Do ``work`` and exit with its code; report a failure as the user should see it."""
    try:
        code = work()
    except DistloopError as failure:
        _report(failure, show_trace=traceback)
        _fail(failure.exit_code)
    except KeyboardInterrupt:
        _fail(INTERRUPTED)
    except Terminated:
        _fail(TERMINATED)
    except Exception as failure:
        _report(failure, show_trace=True)
        _fail(1)
    if _company():
        # With gloo's threads about, torch now and then aborts in the interpreter's end (exit 134): end before it.
        atexit._run_exitfuncs()
        leave(code)
    sys.exit(code)


def lost_peer(failure: BaseException) -> RankDiedError | RankHungError | None:
    """Return what a broken or silent connection means: gloo reports both as a bare RuntimeError."""
    from distloop.transports.process_group import LOST, SILENT

    if not isinstance(failure, RuntimeError):
        return None
    if any(sign in str(failure) for sign in SILENT):
        return RankHungError("another rank has not been heard from for as long as world.timeout")
    sign = next((sign for sign in LOST if sign in str(failure)), None)
    if sign is None:
        return None
    return RankDiedError(f"another rank has ended, or cannot be reached ({sign[0].lower()}{sign[1:]})")


def parting(failure: BaseException, transport: Transport) -> BaseException:
    """Return what to report of a failure, before this rank leaves the others; tell them, where there is a heartbeat.

    Those that wait for a silent rank in vain say so meanwhile; who waits for whom does not tell it, as in a ring.
    Without a heartbeat, stay connected for a moment if the failure is another rank's: the others are to find that one,
    and not this one.
    """
    from distloop.heartbeat import Heartbeat, SecondaryError
    from distloop.transports.meeting import roll_call

    found, heartbeat = lost_peer(failure) or failure, Heartbeat.current()
    if isinstance(found, RankDiedError):
        fate = None if heartbeat is None else heartbeat.fate(0.5, longer=1.5)
        if heartbeat is None:
            time.sleep(0.5)
        elif fate is not None:
            found = RankDiedError(f"{found}; {fate}")
    elif isinstance(found, RankHungError) and (silent := roll_call(transport.rank, transport.size)):
        ranks = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        found = RankHungError(f"{found}; silent altogether: {ranks}")
    elif isinstance(found, SystemExit) and not isinstance(found, Terminated) and transport.size > 1:
        found = RankDiedError(
            f"code of the task on rank {transport.rank} called sys.exit({found.code!r}) in the midst of the run, "
            "which the other ranks cannot go on with alone"
        )
    if heartbeat is None:
        return found
    verdict = heartbeat.post(_exit_code(found), _sentence(found, heartbeat))
    if verdict.rank == transport.rank or isinstance(found, KeyboardInterrupt | SystemExit):
        return found
    return SecondaryError(verdict)


def _exit_code(failure: BaseException) -> int:
    if isinstance(failure, KeyboardInterrupt | Terminated):
        return TERMINATED if isinstance(failure, Terminated) else INTERRUPTED
    return failure.exit_code if isinstance(failure, DistloopError) else 1


def _sentence(failure: BaseException, heartbeat: Heartbeat) -> str:
    if isinstance(failure, DistloopError):
        return str(failure)
    return f"rank {heartbeat.rank} raised {type(failure).__name__}: {failure}"


def _report(failure: BaseException, *, show_trace: bool) -> None:
    """Say what has failed, unless another rank says the same or its cause."""
    if not _speaks(failure):
        if (world := _world()) is not None and world.by_mpirun:
            time.sleep(PATIENCE)  # mpirun ends all ranks with the first: let that be the one that speaks
        return
    trace = traceback_module.format_exception(failure) if show_trace else []
    print("".join(trace), end="", file=sys.stderr)
    if "distloop.heartbeat" not in sys.modules:  # nothing was under way, and it costs an import of torch
        if isinstance(failure, DistloopError):
            print("\n".join(f"distloop: {line}" for line in str(failure).splitlines()), file=sys.stderr)
        return
    from distloop.last_words import leave_word

    leave_word(failure, _exit_code(failure), trace=trace)


def _speaks(failure: BaseException) -> bool:
    heartbeat = sys.modules.get("distloop.heartbeat")
    current = None if heartbeat is None else heartbeat.Heartbeat.current()
    if current is not None and current.verdict is not None:
        return bool(current.verdict.rank == current.rank)
    if isinstance(failure, DistloopError) and failure.everywhere:
        world = _world()
        # One per host: what all ranks of a host find, another host may not.
        return world is None or world.local_rank == 0
    return all(transport.claim("failure") for transport in _company())


def _company() -> list[ModuleType]:
    """Return the modules of transports through which this process has met other ranks."""
    modules = [sys.modules.get(f"distloop.transports.{name}") for name in ("meeting", "mpi")]
    return [module for module in modules if module is not None and module.has_met()]


def _world() -> World | None:
    try:
        return World.from_environment()
    except DistloopError:
        return None


def _fail(code: int) -> NoReturn:
    """End now, and the other ranks of an MPI job with this one. Destructors of process groups are not run."""
    for transport in _company():
        if hasattr(transport, "abort"):
            flush()
            transport.abort(code)
    leave(code)
