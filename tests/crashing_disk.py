"""A disk that records what is done, and what a loss of power may leave of it; and a disk that fails."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distloop.checkpoints import Disk

CONTENTS = ("empty", "truncated", "full")


class QuickDisk(Disk):
    """Waits for no disk: for tests that cut no power."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        assert path.is_dir()


class Recorder(QuickDisk):
    """Keeps the operations that change something, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self._paths: dict[int, Path] = {}

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._paths[descriptor] = path
        self.log.append(("create", path))
        return descriptor

    def put(self, descriptor: int, data: memoryview) -> None:
        super().put(descriptor, data)
        self.log.append(("put", self._paths[descriptor], bytes(data)))

    def sync(self, descriptor: int) -> None:
        # A link's source is opened for reading and was not created here.
        self.log.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.log.append(("sync_directory", path))

    def make_directory(self, path: Path, *, exist_ok: bool = False) -> None:
        there = path.is_dir()
        super().make_directory(path, exist_ok=exist_ok)
        if not there:
            self.log.append(("make_directory", path))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.log.append(("rename", source, target))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self.log.append(("remove", path))

    def remove_tree(self, path: Path) -> None:
        for folder, _, files in os.walk(path, topdown=False):
            self.log += [("remove", Path(folder) / name) for name in files]
            self.log.append(("remove", Path(folder)))
        super().remove_tree(path)

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self.log.append(("link", source, target))


@dataclass
class File:
    data: bytes = b""
    synced: bool = False


@dataclass
class Folder:
    names: dict[str, File | Folder] = field(default_factory=dict)


Change = list[tuple[Folder, str, File | Folder | None]]  # what one operation does to names, as a whole


class Model:
    """A file system as POSIX promises it: content is safe after fsync of the file, a name after that of its folder.

    Names that are not safe may each have reached the disk or not, in any order.
    """

    def __init__(self, root: Path):
        self.root, self.top = root, Folder()
        self._pending: list[Change] = []
        _load(root, self.top)
        self._safe = _copy_names(self.top)

    def apply(self, operation: tuple[Any, ...]) -> None:
        kind, path = operation[0], operation[1]
        if kind == "sync_directory":
            synced = self._at(path)
            for change in [c for c in self._pending if any(part[0] is synced for part in c)]:
                self._make_safe(change)
            return
        folder, name = self._at(path.parent), path.name
        if kind == "create":
            self._change([(folder, name, File())])
        elif kind == "make_directory":
            self._change([(folder, name, Folder())])
        elif kind == "remove":
            self._change([(folder, name, None)])
        elif kind == "rename":
            target = self._at(operation[2].parent)
            self._change([(folder, name, None), (target, operation[2].name, folder.names[name])])
        elif kind == "link":
            self._change([(self._at(operation[2].parent), operation[2].name, folder.names[name])])
        else:
            found = folder.names[name]
            assert isinstance(found, File)
            found.data, found.synced = found.data + (operation[2] if kind == "put" else b""), kind == "sync"

    def _make_safe(self, change: Change) -> None:
        self._pending.remove(change)
        for folder, name, node in change:
            _set(self._safe.setdefault(id(folder), {}), name, node)

    def _change(self, change: Change) -> None:
        self._pending.append(change)
        for folder, name, node in change:
            _set(folder.names, name, node)

    def _at(self, path: Path) -> Folder:
        found = self.top
        for name in path.relative_to(self.root).parts:
            inner = found.names[name]
            assert isinstance(inner, Folder)
            found = inner
        return found

    def crashes(self, seed: int) -> Iterator[dict[str, bytes | None]]:
        """Yield what may be there after a loss of power now: by path, a file's content, or None for a folder."""
        draw = random.Random(seed)
        every = self._pending
        chosen: list[tuple[Sequence[Change], str | None]] = [(kept, how) for kept in ([], every) for how in CONTENTS]
        chosen += [([other for other in every if other is not one], "full") for one in every]
        chosen += [([one for one in every if draw.random() < 0.5], None) for _ in range(4)]
        seen = set()
        for kept, content in chosen:
            state = self._state(kept, content, draw)
            if (key := tuple(sorted(state.items()))) not in seen:
                seen.add(key)
                yield state

    def _state(self, kept: Sequence[Change], content: str | None, draw: random.Random) -> dict[str, bytes | None]:
        safe = {key: dict(names) for key, names in self._safe.items()}
        for change in kept:
            for folder, name, node in change:
                _set(safe.setdefault(id(folder), {}), name, node)
        found: dict[str, bytes | None] = {}

        def walk(folder: Folder, prefix: str) -> None:
            for name, node in safe.get(id(folder), {}).items():
                if isinstance(node, Folder):
                    found[prefix + name] = None
                    walk(node, f"{prefix}{name}/")
                else:
                    how = "full" if node.synced else content or draw.choice(CONTENTS)
                    cut = {"full": len(node.data), "empty": 0, "truncated": len(node.data) // 2}[how]
                    found[prefix + name] = node.data[:cut]

        walk(self.top, "")
        return found


def put_back(state: dict[str, bytes | None], root: Path) -> None:
    """Make what a crash has left, in an empty folder."""
    root.mkdir()
    for name, data in sorted(state.items(), key=lambda item: item[0].count("/")):
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)


def _load(path: Path, folder: Folder) -> None:
    for inner in path.iterdir():
        node: File | Folder = Folder() if inner.is_dir() else File(inner.read_bytes(), synced=True)
        folder.names[inner.name] = node
        if isinstance(node, Folder):
            _load(inner, node)


def _copy_names(folder: Folder) -> dict[int, dict[str, File | Folder]]:
    found = {id(folder): dict(folder.names)}
    for node in folder.names.values():
        if isinstance(node, Folder):
            found |= _copy_names(node)
    return found


def _set(names: dict[str, File | Folder], name: str, node: File | Folder | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


class FailingDisk(QuickDisk):
    """Fails at its ``at``-th operation that changes something, once or from then on.

    Removing goes on working on a full disk, so ``on`` failures spare it unless all is read-only.
    """

    def __init__(self, at: int, code: int = errno.ENOSPC, *, on: bool = False):
        self.at, self.code, self.on, self.count = at, code, on, 0

    def _strike(self, *, removal: bool = False) -> None:
        self.count += 1
        late = self.on and self.count > self.at and not (removal and self.code == errno.ENOSPC)
        if self.count == self.at or late:
            raise OSError(self.code, os.strerror(self.code))

    def create(self, path: Path) -> int:
        self._strike()
        return super().create(path)

    def put(self, descriptor: int, data: memoryview) -> None:
        half = data[: len(data) // 2]
        try:
            self._strike()
        except OSError:
            super().put(descriptor, half)
            raise
        super().put(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._strike()

    def sync_directory(self, path: Path) -> None:
        self._strike()

    def make_directory(self, path: Path, *, exist_ok: bool = False) -> None:
        self._strike()
        super().make_directory(path, exist_ok=exist_ok)

    def rename(self, source: Path, target: Path) -> None:
        self._strike()
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._strike()
        super().link(source, target)

    def remove(self, path: Path) -> None:
        self._strike(removal=True)
        super().remove(path)
