"""Which of several ranks' exit codes an agent ends with."""

from __future__ import annotations

from collections.abc import Iterable

from distloop.errors import INTERRUPTED, REQUEUE, TERMINATED

# The root cause comes before what follows from it on other ranks, that before a stop, and a stop before what killed.
CAUSES = (2, 4, 3, 22, 20, 21, 13, 12, 1)
FOLLOWING = (11, 10, REQUEUE)
STOPPED = (INTERRUPTED, TERMINATED)
FINAL = {2, 4, 13, 20, 21, 22, REQUEUE, INTERRUPTED, TERMINATED}  # another attempt would come to the same


def telling(codes: Iterable[int]) -> int:
    """Return the exit code that says most of those of several processes; -9 stands for what signal 9 killed."""
    ended = [code if code >= 0 else 128 - code for code in codes]
    others = [code for code in ended if code not in (0, *CAUSES, *FOLLOWING, *STOPPED)]
    scripts, signals = [code for code in others if code < 128], [code for code in others if code >= 128]
    order = (*CAUSES, *scripts, *FOLLOWING, *signals, *STOPPED)
    return next((code for code in order if code in ended), 0)
