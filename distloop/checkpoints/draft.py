"""A checkpoint while it is written: no loader sees it before it is whole, and on the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distloop.checkpoints import text
from distloop.checkpoints.disk import checking, gone, storing
from distloop.checkpoints.names import COMMIT, MANIFEST, PART, STATE, SUFFIX, check_file
from distloop.checkpoints.reading import SCHEMA, Checkpoint, examine, read_header
from distloop.checkpoints.table import build, row
from distloop.checkpoints.tensors import Stored, file_of, parts
from distloop.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    from distloop.checkpoints.store import Checkpoints

POLL = 0.005  # seconds between two looks for what other ranks have finished


class Draft:
    """What one rank writes of a checkpoint; made by :meth:`Checkpoints.draft`.

    A rank writes and links files, then reports. Rank 0 commits besides. No method but :meth:`commit` waits for
    other ranks, and none communicates: any thread may do it.
    """

    def __init__(self, owner: Checkpoints, step: int, path: Path):
        self.step, self.path = step, path
        self._owner, self._disk = owner, owner.disk
        self._files: dict[str, dict[str, Any]] = {}
        self._rows: list[dict[str, Any]] = []

    def write(self, file: str, tensors: Iterable[Stored], metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file of this rank; on return its content is on the disk.

        Args:
            file: a name that no other rank uses, a-z, 0-9, dot, underscore and hyphen, ending in .safetensors.
            tensors: what is in it. They are kept until all are written, and copied one at a time if they have to be.
            metadata: of the file; "format" is added.

        Raises:
            CheckpointError: a name or a tensor cannot be stored.
            StorageError: the file cannot be written.
        """
        check_file(file)
        if not file.endswith(SUFFIX):
            raise CheckpointError(f"{file!r}: a file of tensors ends in {SUFFIX}")
        found, header = file_of(tensors, metadata)
        with storing(self.path / file):
            bytes_, digest = self._disk.write(self.path / file, parts(found, header))
        self._files[file] = {"bytes": bytes_, "sha256": digest}
        self._rows += [row(file, stored) for stored in found]

    def link(self, file: str, source: Path) -> None:
        """Take a finished file into this checkpoint: as a hard link, or a copy where there are none.

        Nobody may write into ``source`` any more. The tensors of a safetensors file are of the checkpoint, whole.

        Raises:
            CheckpointError: ``source`` is no file, or no safetensors file though its name says so.
            StorageError: the file cannot be written.
        """
        check_file(file)
        target = self.path / file
        with storing(target):
            self._disk.link_or_copy(source, target)
        with checking(target):
            bytes_, digest = self._disk.size_and_digest(target)
        self._files[file] = {"bytes": bytes_, "sha256": digest}
        if file.endswith(SUFFIX):
            entries, _ = read_header(target, self._disk)
            self._rows += [
                {"name": key, "said": {"dtype": entry.dtype, "shape": list(entry.shape)}, "file": file, "start": None}
                for key, entry in entries.items()
            ]

    def report(self, rank: int, own: Any) -> None:
        """Say that this rank has written its files: the last thing that it does.

        Args:
            rank: this one.
            own: what is its own, as JSON holds it; entry ``rank`` of the state's "ranks".
        """
        said = {"files": self._files, "tensors": self._rows, "own": own}
        name = f"part-{rank:05d}.json"
        data = text.encode(said, f"rank {rank}'s part")
        with storing(self.path / name):
            # Renamed, so that rank 0 finds all of it or nothing.
            self._disk.write(self.path / f".{name}", [data])
            self._disk.rename(self.path / f".{name}", self.path / name)

    def fail(self, rank: int, reason: str) -> None:
        """Say that this rank has failed, so that rank 0 need not wait for it. Never fails itself."""
        name = f"part-{rank:05d}.failed"
        for data in (reason.encode("utf-8", "replace")[:2000], b""):  # on a full disk there may be room for a name
            try:
                self._disk.write(self.path / f".{name}", [data])
            except FileExistsError:
                pass
            except OSError:
                continue
            try:
                self._disk.rename(self.path / f".{name}", self.path / name)
            except OSError:
                continue
            return

    def commit(
        self,
        ranks: int,
        state: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        timeout: float,
        stop: Callable[[], bool] = lambda: False,
        verify: bool = False,
    ) -> Checkpoint:
        """Make a checkpoint of what all ranks have written; for rank 0, after its own report.

        Waits for the others' reports, checks them against the files, and renames the draft. If it fails the draft is
        removed, and the checkpoints there are stay as they were. (If the last fsync alone fails, that of the new
        name, the new one may be there or not after a crash, and is until then.)

        Args:
            ranks: how many report.
            state: scalars and all that JSON holds; "ranks" is added: what each rank reported as its own.
            facts: of the run, for the manifest.
            timeout: seconds to wait for reports.
            stop: asked meanwhile; True gives up.
            verify: read all files back and hash them before the draft becomes a checkpoint.

        Raises:
            StorageError: the disk refuses, in the system's words; or a rank has failed or not reported.
            CheckpointError: there is one of this step already; or what the ranks wrote does not fit together.
        """
        try:
            return self._commit(self._wait(ranks, timeout, stop), state, facts, verify=verify)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove the draft. What cannot be removed is left for the next start."""
        gone(self._disk, self.path)

    def _wait(self, ranks: int, timeout: float, stop: Callable[[], bool]) -> list[dict[str, Any]]:
        """Return the ranks' parts, by rank."""
        end, found = time.monotonic() + timeout, {}
        while True:
            with checking(self.path):
                names = sorted(inner.name for inner in self.path.iterdir())
            for name in names:
                part = PART.fullmatch(name)
                if part and int(part[1]) not in found:
                    found[int(part[1])] = self._part(name, failed=part[2] == "failed")
            missing = sorted(set(range(ranks)) - set(found))
            if not missing:
                break
            who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:8]))}"
            if stop():
                raise StorageError(f"{self.path}: given up, as asked, before {who} had written")
            if time.monotonic() > end:
                raise StorageError(f"{self.path}: {who} did not finish writing within {timeout:g} s")
            time.sleep(POLL)
        if len(found) > ranks:
            raise CheckpointError(f"{self.path}: rank {max(found)} has reported; there are {ranks} ranks")
        return [found[rank] for rank in range(ranks)]

    def _part(self, name: str, *, failed: bool) -> dict[str, Any]:
        with checking(self.path / name):
            data = self._disk.read(self.path / name, text.LARGEST)
            if not failed:
                part = text.decode(data)
                assert isinstance(part, dict)
                return part
        reason = data.decode("utf-8", "replace") or "it could not write the reason down"
        raise StorageError(f"rank {int(name[5:-7])} could not write its part of {self.path}: {reason}")

    def _commit(
        self, found: list[dict[str, Any]], state: Mapping[str, Any], facts: Mapping[str, Any], *, verify: bool
    ) -> Checkpoint:
        disk, target = self._disk, self._owner.path(self.step)
        if "ranks" in state:
            raise CheckpointError("state: has an entry 'ranks', which is for what the ranks report")
        files: dict[str, dict[str, Any]] = {}
        for rank, part in enumerate(found):
            if twice := set(files) & set(part["files"]):
                raise CheckpointError(f"{min(twice)}: is reported by rank {rank} and by another")
            files |= part["files"]
        table = build(line for part in found for line in part["tensors"])
        every = text.encode({**state, "ranks": [part["own"] for part in found]}, STATE)
        with storing(self.path):
            for rank in range(len(found)):
                disk.remove(self.path / f"part-{rank:05d}.json")
            bytes_, digest = disk.write(self.path / STATE, [every])
            manifest = {
                "schema": SCHEMA,
                "step": self.step,
                "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "facts": facts,
                "files": files | {STATE: {"bytes": bytes_, "sha256": digest}},
                "tensors": table,
            }
            _, digest = disk.write(self.path / MANIFEST, [text.encode(manifest, MANIFEST)])
            disk.write(self.path / COMMIT, [digest.encode() + b"\n"])
            disk.sync_directory(self.path)
        checked = examine(self.path, disk, contents=verify)
        if os.path.lexists(target):
            raise CheckpointError(f"{target}: is there already; a checkpoint is never written over")
        with storing(target):
            disk.rename(self.path, target)
            disk.sync_directory(target.parent)
        self._owner.knows(self.step)
        return replace(checked, path=target)
