"""Where the values live that this rank updates, and what of them goes back to the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distloop.strategies.base import Shard
from distloop.strategies.zero_offload.flat import Bucket
from distloop.strategies.zero_offload.links import Link

IN_FLIGHT = 3  # buckets that are on their way at once: of gradients on the device, of new values on the host


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return in which dtype values of this one are added up and updated."""
    return torch.float32 if dtype.itemsize < 4 else dtype


class Values:
    """What this rank owns of every bucket, as its optimizer has it; the parameters move into the buckets.

    Apart from the model, unless that is in the same memory and in the same precision. Where the model is in less, new
    values are rounded into a few places that are used in turn, or into the model itself if it is at hand.

    Args:
        buckets: where the model's parameters will be.
        links: the way of each to the host.
        delayed: whether the optimizer's values are not yet the model's, so that neither may overwrite the other.
    """

    def __init__(self, buckets: Sequence[Bucket], links: Sequence[Link], *, delayed: bool):
        self._buckets, self._links = buckets, links
        self._places: dict[tuple[Link, torch.dtype], list[Tensor]] = {}
        self._values = self._homes(delayed=delayed)
        self._rounded = [None if delayed else self._place(i) for i in range(len(buckets))]
        self.shards: list[Shard] = []
        for bucket, values, rounded in zip(buckets, self._values, self._rounded, strict=True):
            bucket.adopt(values)
            self.shards.append(bucket.segments(values, rounded))

    def going_up(self, i: int) -> Tensor | None:
        """Return what is to be copied to the model for bucket ``i``, unless it is there already."""
        bucket, values, rounded = self._buckets[i], self._values[i], self._rounded[i]
        source = values if rounded is None else rounded
        if source.data_ptr() == bucket.own.data_ptr():
            return None
        if rounded is None and not self._links[i].direct and (place := self._place(i)) is not None:
            return place.copy_(values)
        return source

    def _homes(self, *, delayed: bool) -> list[Tensor]:
        """Return memory for the values of each bucket: stretches of one tensor for each link and dtype."""
        homes: list[Tensor | None] = []
        sizes: dict[tuple[Link, torch.dtype], int] = {}
        for bucket, link in zip(self._buckets, self._links, strict=True):
            dtype = exact(bucket.flat.dtype)
            own = link.direct and bucket.flat.dtype == dtype and not delayed
            homes.append(bucket.own if own else None)
            sizes[link, dtype] = sizes.get((link, dtype), 0) + (0 if own else len(bucket.own))
        rest = {(link, dtype): link.keep(size, dtype) for (link, dtype), size in sizes.items()}
        found = []
        for bucket, link, home in zip(self._buckets, self._links, homes, strict=True):
            key = link, exact(bucket.flat.dtype)
            if home is None:
                home, rest[key] = rest[key].tensor_split([len(bucket.own)])  # noqa: PLW2901
            found.append(home)
        return found

    def _place(self, i: int) -> Tensor | None:
        """Return where the values of bucket ``i`` are rounded to, if they are at all."""
        bucket, link = self._buckets[i], self._links[i]
        if exact(bucket.flat.dtype) == bucket.flat.dtype:
            return None
        if link.direct:
            return bucket.own
        key = link, bucket.flat.dtype
        if key not in self._places:
            longest = max(len(b.own) for b in self._buckets)
            self._places[key] = [link.allocate(longest, bucket.flat.dtype) for _ in range(IN_FLIGHT)]
        return self._places[key][i % IN_FLIGHT][: len(bucket.own)]
