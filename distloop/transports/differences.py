"""What ranks know, compared: the first thing that is not the same on all of them, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def first_difference(by_rank: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> str:
    """Return the first fact that is not the same on rank 0 and another, with both sides; "" if all are.

    ``names`` are what ranks are called, in place of their numbers.
    """
    first = by_rank[0]
    for rank, theirs in enumerate(by_rank):
        for key in [*first, *theirs]:
            one, other = (json.dumps(facts.get(key), sort_keys=True) for facts in (first, theirs))
            if one != other:  # as text, because NaN is not equal to itself
                here, there = (names[0], names[rank]) if names else ("rank 0", f"rank {rank}")
                return f"{key} is {one} on {here} and {other} on {there}"
    return ""
