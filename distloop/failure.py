"""How a rank ends: one sentence by one rank, the exit code that says what kind of failure it was, and no waiting."""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback as traceback_module
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from distloop.errors import INTERRUPTED, DistloopError, RankDiedError, RankHungError

if TYPE_CHECKING:
    from distloop.transports import Transport


def guarded(work: Callable[[], int], *, traceback: bool = False) -> NoReturn:
    """Do ``work`` and exit with its code; report a failure as the user should see it."""
    try:
        code = work()
    except DistloopError as failure:
        _report(failure, show_trace=traceback)
        _leave(failure.exit_code)
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except Exception as failure:
        _report(failure, show_trace=True)
        _leave(1)
    if _in_company():
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
    return RankDiedError(f"another rank ended, or cannot be reached ({sign[0].lower()}{sign[1:]})")


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
        return
    if show_trace:
        traceback_module.print_exception(failure)
    if isinstance(failure, DistloopError):
        print("\n".join(f"distloop: {line}" for line in str(failure).splitlines()), file=sys.stderr)


def _speaks(failure: BaseException) -> bool:
    if isinstance(failure, DistloopError) and failure.everywhere:
        return _local_rank() in (None, 0)  # one per host: what all ranks of a host find, another host may not
    if not _in_company():
        return True
    from distloop.transports.process_group import claim

    return claim("failure")


def _in_company() -> bool:
    """Return whether this process has met other ranks."""
    if "torch" not in sys.modules:
        return False
    from distloop.transports.process_group import has_met

    return has_met()


def _local_rank() -> int | None:
    from distloop.world import World

    try:
        return World.from_environment().local_rank
    except DistloopError:
        return None


def _leave(code: int) -> NoReturn:
    """End now. Destructors of process groups wait for peers that may be gone, so they are not run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
