"""Block codes with BPSK, their exact decoding, and how far apart two curves of error rates are."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

Curve = list[tuple[float, float]]  # (Eb/N0 in dB, block error rate), by rising Eb/N0

HIGHEST, LOWEST, LEVELS = 1e-1, 1e-3, 41  # the block error rates at which curves are compared

# Bits of a codeword are the message's bits times this, modulo 2: its own four, then three parities (Hamming 1950).
_HAMMING = [
    [1, 0, 0, 0, 1, 1, 0],
    [0, 1, 0, 0, 1, 0, 1],
    [0, 0, 1, 0, 0, 1, 1],
    [0, 0, 0, 1, 1, 1, 1],
]


def uncoded(k: int) -> Tensor:
    """Return the blocks of 2^k messages whose bits are sent as they are, of shape (2^k, k)."""
    return _bpsk(_bits(k))


def hamming_7_4() -> Tensor:
    """Return the blocks of 16 messages in the Hamming(7,4) code, of shape (16, 7)."""
    return _bpsk(_bits(4) @ torch.tensor(_HAMMING) % 2)


def decode(book: Tensor, received: Tensor) -> Tensor:
    """Return the most likely message for each received block, of shape (samples,).

    All blocks in ``book`` have one energy; then the nearest of them is the one with the largest inner product. In
    double precision, which autocast leaves as it is.
    """
    return (received.double() @ book.double().T).argmax(1)


def gap_db(curve: Curve, reference: Curve) -> float:
    """Return by how many dB at most ``curve`` lies right of (worse than) ``reference``, at rates from 1e-1 to 1e-3.

    Only rates that the reference reaches are compared. A curve that does not get down to one of them counts as if it
    did at its right end, so that what is returned is then the least that the gap can be; one that starts below it, as
    if it did at its left end. It is nan if the reference has none of these rates (too few blocks).
    """
    exponents = torch.linspace(math.log10(HIGHEST), math.log10(LOWEST), LEVELS, dtype=torch.float64).tolist()
    least, most = (math.log10(max(bound(rate for _, rate in reference), 1e-12)) for bound in (min, max))
    compared = [exponent for exponent in exponents if least <= exponent <= most]
    gaps = (crossing(curve, exponent) - crossing(reference, exponent) for exponent in compared)
    return max(gaps, default=math.nan)


def crossing(curve: Curve, exponent: float) -> float:
    """Return the Eb/N0 in dB from which on the error rate is below 10^``exponent``, interpolated in its logarithm."""
    points = [(db, math.log10(max(rate, 1e-12))) for db, rate in curve]
    found = points[0][0]
    for (left, before), (right, after) in pairwise(points):
        if before > exponent >= after:
            found = left + (right - left) * (before - exponent) / (before - after)
    return points[-1][0] if points[-1][1] > exponent else found


def _bits(k: int) -> Tensor:
    """Return the bits of 0 to 2^k - 1, the highest first, of shape (2^k, k)."""
    return torch.arange(2**k)[:, None] >> torch.arange(k - 1, -1, -1) & 1


def _bpsk(bits: Tensor) -> Tensor:
    return 1.0 - 2.0 * bits.float()
