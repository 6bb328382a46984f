"""The table of a checkpoint's tensors: which there are, and in which files their pieces lie."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distloop.checkpoints.names import cut_key, is_tensor
from distloop.checkpoints.tensors import DTYPES, NAMES, Entry, Stored, is_shape, permuted
from distloop.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of a tensor as stored, flattened: in ``file`` from byte ``offset`` on."""

    file: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Info:
    """What a checkpoint knows of one tensor.

    Args:
        dtype: of its elements.
        shape: the logical one.
        order: the tensor as stored is ``logical.permute(order)``; None if it is the logical one.
        pieces: in order, each element in exactly one.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...] | None
    pieces: tuple[Piece, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return permuted(self.shape, self.order)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def row(file: str, stored: Stored) -> dict[str, Any]:
    """Return what the rank that has written a tensor tells of it."""
    place = {"start": stored.start, "stop": (stored.start or 0) + stored.tensor.numel()}
    said: dict[str, Any] = {"dtype": NAMES[stored.tensor.dtype], "shape": list(stored.logical_shape)}
    if stored.order is not None:
        said["order"] = list(stored.order)
    return {"name": stored.name, "said": said, "file": file} | place


def build(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the table of a manifest from what all ranks tell.

    Raises:
        CheckpointError: they contradict each other.
    """
    table: dict[str, dict[str, Any]] = {}
    pieces: dict[str, list[dict[str, Any]]] = {}
    for found in rows:
        name, file = found["name"], found["file"]
        if name not in table:
            table[name] = dict(found["said"])
        elif found["start"] is None or name not in pieces:
            raise CheckpointError(f"tensor {name!r}: is stored whole, and once more in {file}")
        elif table[name] != found["said"]:
            raise CheckpointError(f"tensor {name!r}: is {found['said']} in {file} and {table[name]} elsewhere")
        if found["start"] is None:
            table[name] |= {"file": file}
        else:
            pieces.setdefault(name, []).append({key: found[key] for key in ("file", "start", "stop")})
    for name, of in pieces.items():
        table[name] |= {"pieces": sorted(of, key=lambda piece: (piece["start"], piece["stop"]))}
    return table


def resolve(table: object, headers: Mapping[str, Mapping[str, Entry]]) -> dict[str, Info]:
    """Check that the table and the headers of all files tell the same, and return the tensors by name.

    Raises:
        ValueError: the first contradiction.
    """
    if not isinstance(table, dict):
        raise ValueError("has no table of tensors")
    left = {(file, key) for file, entries in headers.items() for key in entries}
    found = {name: _info(name, said, headers, left) for name, said in table.items()}
    if left:
        file, key = min(left)
        raise ValueError(f"tells of no tensor {key[:80]!r}, which is in {file}")
    return found


def _info(name: str, said: object, headers: Mapping[str, Mapping[str, Entry]], left: set[tuple[str, str]]) -> Info:
    _check_said(name, said)
    assert isinstance(said, dict)
    shape, order = tuple(said["shape"]), tuple(said["order"]) if "order" in said else None
    total, end, pieces = math.prod(shape), 0, []
    whole = "file" in said
    listed = [{"file": said["file"], "start": 0, "stop": total}] if whole else said["pieces"]
    for piece in listed:
        file, start, stop = piece["file"], piece["start"], piece["stop"]
        key = name if whole else cut_key(name, start, stop)
        entry = headers.get(file, {}).get(key)
        if entry is None or (file, key) not in left:
            raise ValueError(f"tells of {key[:80]!r} in {str(file)[:120]}, where it is not")
        left.remove((file, key))
        expected = permuted(shape, order) if whole else (stop - start,)
        if (entry.dtype, entry.shape) != (said["dtype"], expected):
            raise ValueError(
                f"says that {key[:80]!r} is {said['dtype']} of shape {list(expected)}; "
                f"in {file} it is {entry.dtype} of shape {list(entry.shape)}"
            )
        if start != end or (stop <= start and not whole):
            raise ValueError(f"has pieces of {name[:80]!r} that do not follow each other: {end} is followed by {start}")
        end = stop
        pieces.append(Piece(file, start, stop, entry.begin))
    if end != total:
        raise ValueError(f"has pieces of {name[:80]!r} up to {end}; it has {total} elements")
    return Info(DTYPES[said["dtype"]], shape, order, tuple(pieces))


def _check_said(name: str, said: object) -> None:
    """Check the form of one line of the table."""
    wrong = f"says of tensor {name[:80]!r}"
    if not is_tensor(name):
        raise ValueError(f"{wrong}: that is no name of a tensor")
    if not isinstance(said, dict) or set(said) - {"order"} not in (
        {"dtype", "shape", "file"},
        {"dtype", "shape", "pieces"},
    ):
        raise ValueError(f"{wrong} other than dtype, shape, order, and file or pieces")
    if not isinstance(said["dtype"], str) or said["dtype"] not in DTYPES or not is_shape(said["shape"]):
        raise ValueError(f"{wrong} a dtype or shape that cannot be")
    if "order" in said and (not is_shape(said["order"]) or sorted(said["order"]) != list(range(len(said["shape"])))):
        raise ValueError(f"{wrong} an order that is none of its dimensions")
    if "file" in said:
        pieces: object = [{"file": said["file"], "start": 0, "stop": 0}]
    else:
        pieces = said["pieces"]
    if not isinstance(pieces, list) or not all(isinstance(piece, dict) for piece in pieces):
        raise ValueError(f"{wrong} pieces that are no list of tables")
    for piece in pieces:
        if set(piece) != {"file", "start", "stop"} or not isinstance(piece["file"], str):
            raise ValueError(f"{wrong} a piece without file, start and stop")
        if not is_shape([piece["start"], piece["stop"]]):
            raise ValueError(f"{wrong} a piece from {piece['start']!r} to {piece['stop']!r}")
