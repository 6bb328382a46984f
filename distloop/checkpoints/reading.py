"""A checkpoint that has been verified, and how it is: nothing of it is believed before."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distloop.checkpoints import text
from distloop.checkpoints.disk import Disk, checking
from distloop.checkpoints.names import COMMIT, MANIFEST, STATE, SUFFIX, claims_to_be_data, is_file, step_name, step_of
from distloop.checkpoints.table import Info, resolve
from distloop.checkpoints.tensors import Entry, as_bytes, header_length, parse
from distloop.errors import CheckpointError

SCHEMA = 1
THREADS = min(4, os.cpu_count() or 1)  # that hash files of one checkpoint at once
ALONE = 2**22  # bytes from which on that is faster
SHA256 = re.compile(r"[0-9a-f]{64}")
KEYS = {"schema", "step", "created", "facts", "files", "tensors"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been verified.

    Args:
        step: after which it was taken.
        path: its directory.
        state: what :meth:`Draft.commit` was given, with every rank's own under "ranks".
        manifest: step, time, facts, files and tensors.
        tensors: by name, whatever file they are in.
        metadata: that of each safetensors file, by file.
        digest: sha256 of the manifest, which binds all else: ranks can compare what they have opened.
    """

    step: int
    path: Path
    state: dict[str, Any]
    manifest: dict[str, Any]
    tensors: Mapping[str, Info]
    metadata: Mapping[str, Mapping[str, str]]
    digest: str
    disk: Disk

    def read(self, name: str) -> Tensor:
        """Return a tensor, the logical one, put together from its pieces.

        Raises:
            CheckpointError: there is none of this name, or it cannot be read any more.
        """
        info = self._info(name)
        stored = self.read_range(name, 0, info.numel).view(info.stored_shape)
        if info.order is None:
            return stored
        return stored.permute([info.order.index(i) for i in range(len(info.order))])

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements ``start`` to ``stop`` of a tensor as it is stored (in order of memory), flattened.

        No more of the files is read than that.
        """
        info = self._info(name)
        if not 0 <= start <= stop <= info.numel:
            raise CheckpointError(f"{self.path}: tensor {name!r} has no elements {start}:{stop}, only {info.numel}")
        found = torch.empty(stop - start, dtype=info.dtype)
        data, size = as_bytes(found), info.dtype.itemsize
        for piece in info.pieces:
            a, b = max(start, piece.start), min(stop, piece.stop)
            if a < b:
                path = self.path / piece.file
                with checking(path):
                    into = data[(a - start) * size : (b - start) * size]
                    self.disk.read_at(path, piece.offset + (a - piece.start) * size, into)
        return found

    def _info(self, name: str) -> Info:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}")
        return self.tensors[name]


def examine(path: Path, disk: Disk, *, contents: bool) -> Checkpoint:
    """Verify a checkpoint and return it.

    Args:
        path: its directory.
        disk: to read it from.
        contents: hash all files; without, everything else is checked.

    Raises:
        CheckpointError: it is damaged; names the file, what is wrong, and what is expected.
    """
    _check_directory(path)
    manifest, digest = _manifest(path, disk)
    files = manifest["files"]
    for name in disk.names(path):
        if name not in files and claims_to_be_data(name) and name != MANIFEST:
            raise CheckpointError(f"{path / name}: is not of this checkpoint: {MANIFEST} does not list it")
    for name, said in files.items():
        with checking(path / name):
            found = disk.size(path / name)
        if found != said["bytes"]:
            raise CheckpointError(f"{path / name}: has {found} bytes; {MANIFEST} says {said['bytes']}")
    if contents:
        _check_contents(path, files, disk)
    headers, metadata = {}, {}
    for name in files:
        if name.endswith(SUFFIX):
            headers[name], metadata[name] = read_header(path / name, disk)
    with checking(path / MANIFEST):
        tensors = resolve(manifest["tensors"], headers)
    with checking(path / STATE):
        state = text.decode(disk.read(path / STATE, text.LARGEST))
        if not isinstance(state, dict) or not isinstance(state.get("ranks"), list):
            raise ValueError("is not the state of a run: a table with an entry for ranks")
    return Checkpoint(manifest["step"], path, state, manifest, tensors, metadata, digest, disk)


def read_header(path: Path, disk: Disk) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors of a safetensors file by key, and its metadata."""
    with checking(path):
        size, first = disk.size(path), bytearray(8)
        disk.read_at(path, 0, memoryview(first))
        data = bytearray(header_length(bytes(first), size))
        disk.read_at(path, 0, memoryview(data))
        return parse(bytes(data), size)


def _check_directory(path: Path) -> None:
    with checking(path):
        mode = path.lstat().st_mode
    if not stat.S_ISDIR(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no directory"
        raise CheckpointError(f"{path}: is {kind}; a checkpoint's directory is expected")


def _check_contents(path: Path, files: Mapping[str, Mapping[str, Any]], disk: Disk) -> None:
    def check(name: str) -> None:
        _check_content(path / name, files[name]["sha256"], disk)

    if sum(said["bytes"] for said in files.values()) < ALONE:
        for name in files:
            check(name)
        return
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(check, files))


def _check_content(path: Path, expected: str, disk: Disk) -> None:
    with checking(path):
        _, found = disk.size_and_digest(path)
    if found != expected:
        raise CheckpointError(
            f"{path}: its content has changed: sha256 {found[:12]}…; {MANIFEST} says {expected[:12]}…"
        )


def _manifest(path: Path, disk: Disk) -> tuple[dict[str, Any], str]:
    with checking(path / COMMIT):
        commit = disk.read(path / COMMIT, 100)
    with checking(path / MANIFEST):
        data = disk.read(path / MANIFEST, text.LARGEST)
        found = hashlib.sha256(data).hexdigest()
        if commit != found.encode() + b"\n":
            raise ValueError(f"does not belong to {COMMIT}: sha256 {found[:12]}…; it says {_shown(commit[:12])}…")
        manifest = text.decode(data)
        _check_manifest(manifest)
        step = step_of(path.name)
        if step is not None and manifest["step"] != step:
            raise ValueError(f"is of step {manifest['step']}; the directory says {path.name}")
    assert isinstance(manifest, dict)
    return manifest, found


def _shown(data: bytes) -> str:
    """Return bytes that may be anything, for one line."""
    return ascii(data.decode("ascii", "backslashreplace"))[1:-1]


def _check_manifest(manifest: object) -> None:
    if not isinstance(manifest, dict):
        raise ValueError("is no table")
    if manifest.get("schema") != SCHEMA or isinstance(manifest["schema"], bool):
        raise ValueError(f"has schema {json.dumps(manifest.get('schema'))[:20]}; this version reads {SCHEMA}")
    if set(manifest) != KEYS:
        raise ValueError(f"has other entries than {', '.join(sorted(KEYS))}")
    step, created, files = manifest["step"], manifest["created"], manifest["files"]
    if not is_count(step) or step_of(step_name(step)) != step:
        raise ValueError("has a step that is no number of a step")
    if not isinstance(created, str) or not isinstance(manifest["facts"], dict) or not isinstance(files, dict):
        raise ValueError("has a time, facts or files of another kind")
    datetime.fromisoformat(created)
    for name, said in files.items():
        if name != STATE and not is_file(name):
            raise ValueError(f"lists {name[:80]!r}, which is no name for a checkpoint's file")
        if not isinstance(said, dict) or set(said) != {"bytes", "sha256"}:
            raise ValueError(f"says of file {name!r} other than bytes and sha256")
        if not is_count(said["bytes"]) or not isinstance(said["sha256"], str) or not SHA256.fullmatch(said["sha256"]):
            raise ValueError(f"says of file {name!r} bytes or a sha256 that cannot be")
    if STATE not in files:
        raise ValueError(f"does not list {STATE}")


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
