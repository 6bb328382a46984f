"""How a rank ends: one sentence by one rank, the exit code that says what kind of failure it was, and no waiting."""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback as traceback_module
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from distloop.errors import INTERRUPTED, DistloopError, RankDiedError, RankHungError
from distloop.world import World

PATIENCE = 2.0  # seconds that a rank leaves another to say what both know

if TYPE_CHECKING:
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
    except Exception as failure:
        _report(failure, show_trace=True)
        _fail(1)
    if _company():
        # With gloo's threads about, torch now and then aborts in the interpreter's end (exit 134): end before it.
        atexit._run_exitfuncs()
        _leave(code)
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
    """Return what to report of a failure, before this rank leaves the others.

    If it is another rank's, stay connected for a moment: the others are to find that one, and not this one. Those that
    wait for a silent rank in vain say so meanwhile; who waits for whom does not tell it, as in a ring.
    """
    from distloop.transports.process_group import roll_call

    found = lost_peer(failure) or failure
    if isinstance(found, RankDiedError):
        time.sleep(0.5)
    elif isinstance(found, RankHungError) and (silent := roll_call(transport.rank, transport.size)):
        ranks = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        return RankHungError(f"{found}; silent altogether: {ranks}")
    return found


def _report(failure: BaseException, *, show_trace: bool) -> None:
    """Print the failure, unless another rank says the same or its cause."""
    if not _speaks(failure):
        if (world := _world()) is not None and world.by_mpirun:
            time.sleep(PATIENCE)  # mpirun ends all ranks with the first: let that be the one that speaks
        return
    if show_trace:
        traceback_module.print_exception(failure)
    if isinstance(failure, DistloopError):
        print("\n".join(f"distloop: {line}" for line in str(failure).splitlines()), file=sys.stderr)


def _speaks(failure: BaseException) -> bool:
    if isinstance(failure, DistloopError) and failure.everywhere:
        world = _world()
        # One per host: what all ranks of a host find, another host may not.
        return world is None or world.local_rank == 0
    return all(transport.claim("failure") for transport in _company())


def _company() -> list[ModuleType]:
    """Return the modules of transports through which this process has met other ranks."""
    modules = [sys.modules.get(f"distloop.transports.{name}") for name in ("process_group", "mpi")]
    return [module for module in modules if module is not None and module.has_met()]


def _world() -> World | None:
    try:
        return World.from_environment()
    except DistloopError:
        return None


def _fail(code: int) -> NoReturn:
    """End now, and the other ranks of an MPI job with this one."""
    for transport in _company():
        if hasattr(transport, "abort"):
            _flush()
            transport.abort(code)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End now. Destructors of process groups wait for peers that may be gone, so they are not run."""
    _flush()
    os._exit(code)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
