"""Power lost at any moment of a save, disks full or read-only, damage of every kind: never torn, never none."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from distloop.checkpoints import Checkpoint, Checkpoints, Disk, Stored
from distloop.checkpoints.disk import storing
from distloop.errors import StorageError
from tests.checkpoint_mutations import campaign
from tests.crashing_disk import FailingDisk, Model, QuickDisk, Recorder, put_back

OLD, NEW = 10, 20
Operations = list[tuple[Any, ...]]


def tensors(step: int) -> list[Stored]:
    made = torch.Generator().manual_seed(step)
    return [Stored(f"t{step}.{i}", torch.randn(5 + i, generator=made)) for i in range(2)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: thousands of crashes, and no disk has a part in them."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="distloop-crashes-", dir=memory) as found:
        yield Path(found)


def one_rank(store: Checkpoints, step: int) -> list[Operations]:
    draft = store.draft(step, "x")
    draft.write("model.safetensors", tensors(step))
    draft.write("optim.safetensors", [Stored(f"o{step}", torch.full((3,), float(step)))])
    draft.report(0, None)
    draft.commit(1, {"step": step}, {}, timeout=1)
    return [_taken(store)]


def with_link(store: Checkpoints, step: int) -> list[Operations]:
    """The model lies in the run directory already, and its content not on the disk yet."""
    source = store.directory.parent / f"model-{step}.safetensors"
    with storing(source):
        descriptor = store.disk.create(source)
        try:
            store.disk.put(descriptor, memoryview(save({stored.name: stored.tensor for stored in tensors(step)})))
        finally:
            os.close(descriptor)
    draft = store.draft(step, "x")
    draft.link("model.safetensors", source)
    draft.report(0, None)
    draft.commit(1, {"step": step}, {}, timeout=1)
    return [_taken(store)]


def three_ranks(store: Checkpoints, step: int) -> list[Operations]:
    """Return each rank's operations, and those of the commit."""
    drafts, logs = [], []
    for rank in range(3):
        drafts.append(store.draft(step, "x"))
        cut = Stored("cut", torch.arange(4.0) + 4 * rank, (12,), 4 * rank)
        drafts[-1].write(f"model-{rank}.safetensors", [Stored(f"t{rank}", torch.ones(rank + 1)), cut])
        drafts[-1].report(rank, {"rank": rank})
        logs.append(_taken(store))
    drafts[0].commit(3, {"step": step}, {}, timeout=1)
    return [*logs, _taken(store)]


def _taken(store: Checkpoints) -> Operations:
    if not isinstance(store.disk, Recorder):
        return []
    log, store.disk.log = store.disk.log, []
    return log


def interleaved(logs: list[Operations], draw: random.Random) -> Operations:
    """Return one order of what ranks do at once; the last part comes after all others."""
    *first, last = [list(log) for log in logs]
    merged = []
    if len(first) > 1:  # directories are made by whoever comes first
        made = next(n for n, operation in enumerate(first[0]) if operation[0] == "create")
        merged, first[0] = first[0][:made], first[0][made:]
    while any(first):
        merged.append(draw.choice([log for log in first if log]).pop(0))
    return merged + last


def content(found: Checkpoint) -> dict[str, Any]:
    return {"state": found.state, "step": found.step} | {name: found.read(name).tolist() for name in found.tensors}


def names(store: Checkpoints) -> list[str]:
    return store.disk.names(store.directory)


def replay(root: Path, start: Path, operations: Operations, check: Callable[[Path, int], None], seed: int) -> int:
    """Call ``check`` with what each crash leaves, and how many operations there had been; return how many crashes."""
    model, count = Model(root), 0
    for done in range(len(operations) + 1):
        if done:
            model.apply(operations[done - 1])
        for state in model.crashes(seed=seed * 1000 + done):
            put_back(state, start)
            check(start, done)
            shutil.rmtree(start)
            count += 1
    return count


@pytest.mark.parametrize("way", [one_rank, three_ranks, with_link])
@pytest.mark.parametrize("old", [True, False], ids=["with_old", "first"])
def test_a_crash_at_any_operation_leaves_old_or_new(
    way: Callable[[Checkpoints, int], list[Operations]], old: bool, folder: Path
) -> None:
    seen = crash_everywhere(way, folder, old=old)
    assert seen == {OLD if old else None, NEW}


@pytest.mark.parametrize(
    ("kind", "index", "found"), [("sync", 0, "torn"), ("sync_directory", 0, "torn"), ("sync_directory", -1, "safe")]
)
def test_a_save_that_leaves_out_an_fsync_would_be_found(kind: str, index: int, found: str, folder: Path) -> None:
    def without(log: Operations) -> Operations:
        doomed = [number for number, operation in enumerate(log) if operation[0] == kind][index]
        return log[:doomed] + log[doomed + 1 :]

    with pytest.raises(AssertionError, match=found):
        crash_everywhere(one_rank, folder, old=True, spoil=without)


def crash_everywhere(
    way: Callable[[Checkpoints, int], list[Operations]],
    folder: Path,
    *,
    old: bool,
    spoil: Callable[[Operations], Operations] = list,
) -> set[int | None]:
    """Crash at every operation of a save and check what a loader finds; return the steps that it found."""
    run, disk = folder / "run", Recorder()
    run.mkdir()
    store = Checkpoints(run / "checkpoints", disk)
    if old:
        way(store, OLD)
    shutil.copytree(run, folder / "before")
    logs = [spoil(log) for log in way(store, NEW)]
    wanted = {step: content(store.open(store.path(step))) for step in store.steps()}
    shutil.rmtree(run)
    (folder / "before").rename(run)
    seen: set[int | None] = set()

    def check(start: Path, done: int) -> None:
        after = Checkpoints(start / "checkpoints", QuickDisk())
        found = after.newest()
        seen.add(found and found.step)
        assert found is None or content(found) == wanted[found.step]
        assert (found is not None) == old or (not old and found is not None), "there was an old one"
        assert not after.damaged, "nothing that looks like a checkpoint is torn"
        if done == length:
            assert found is not None and found.step == NEW, "what commit() has returned is safe"
        after.clean()
        assert names(after) == [f"step-{step:08d}" for step in after.steps()]

    for seed in range(2 if way is three_ranks else 1):
        operations = interleaved(logs, random.Random(seed))
        length = len(operations)
        assert replay(run, folder / "after", operations, check, seed) > length
    return seen


def test_a_crash_while_others_are_removed_or_set_aside_leaves_the_newest(folder: Path) -> None:
    run, disk = folder / "run", Recorder()
    run.mkdir()
    store = Checkpoints(run / "checkpoints", disk)
    for step in (OLD, NEW, 30):
        one_rank(store, step)
    (store.path(30) / "COMMIT").unlink()
    shutil.copytree(run, folder / "before")
    found = store.newest()
    assert found is not None and found.step == NEW
    wanted = content(found)
    assert store.retain(last=1, every=None, best=set(), reading=None) == [OLD]
    operations = _taken(store)
    assert [operation[0] for operation in operations].count("rename") == 2
    shutil.rmtree(run)
    (folder / "before").rename(run)

    def check(start: Path, done: int) -> None:
        after = Checkpoints(start / "checkpoints", QuickDisk())
        found = after.newest()
        assert found is not None and content(found) == wanted
        for step in after.steps():
            if step < NEW:
                assert after.open(after.path(step)).step == OLD, "a part of it was removed under its name"

    replay(run, folder / "after", operations, check, 0)


def saved_on(root: Path, disk: Disk, way: Callable[[Checkpoints, int], object]) -> tuple[Checkpoints, str | None]:
    """Save once, then once more on this disk; return the checkpoints, and the error."""
    folder = root / "run" / "checkpoints"
    if folder.exists():
        shutil.rmtree(root / "run")
    folder.parent.mkdir()
    one_rank(Checkpoints(folder, QuickDisk()), OLD)
    try:
        way(Checkpoints(folder, disk), NEW)
    except StorageError as failure:
        return Checkpoints(folder), str(failure)
    return Checkpoints(folder), None


@pytest.mark.parametrize("on", [False, True], ids=["once", "from_then_on"])
@pytest.mark.parametrize("way", [one_rank, three_ranks, with_link])
def test_a_disk_that_fails_at_any_operation_keeps_the_checkpoint_before(
    way: Callable[[Checkpoints, int], object], on: bool, tmp_path: Path
) -> None:
    def safe(store: Checkpoints, step: int) -> None:
        """As a rank that fails before commit() does."""
        draft = store.draft(step, "x")
        try:
            way(store, step)
        except StorageError:
            draft.discard()
            raise

    whole = FailingDisk(at=0)
    assert saved_on(tmp_path, whole, safe)[1] is None
    for at in range(1, whole.count + 1):
        store, failure = saved_on(tmp_path, FailingDisk(at, on=on), safe)
        assert failure is not None and "No space left on device" in failure, f"operation {at}: {failure}"
        steps = [OLD, NEW] if at == whole.count else [OLD]  # the last is the fsync after the rename
        found = store.newest()
        assert found is not None and found.step == steps[-1] and not store.damaged
        assert names(store) == [f"step-{step:08d}" for step in steps], "no rubbish"


def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    disk = FailingDisk(1, errno.EROFS, on=True)
    store, failure = saved_on(tmp_path, disk, one_rank)
    assert failure is not None and "Read-only file system" in failure and "checkpoints" in failure
    found = store.newest()
    assert found is not None and found.step == OLD


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow_is_said_in_the_systems_words(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints")
    one_rank(store, OLD)
    draft = store.draft(NEW, "x")
    with largest_file(100_000), pytest.raises(StorageError, match=r"model\.safetensors: cannot be written: File too"):
        draft.write("model.safetensors", [Stored("large", torch.zeros(10**6))])
    draft.fail(0, "File too large")
    with pytest.raises(StorageError, match=r"rank 0 could not write its part .*File too large"):
        draft.commit(1, {}, {}, timeout=1)
    assert names(store) == ["step-00000010"]


def test_no_mutation_of_a_checkpoint_is_accepted(folder: Path) -> None:
    figures = campaign(500, seed=0, folder=folder)
    assert figures["accepted"] == 0, figures["accepted_by_kind"]
    assert figures["other_errors"] == 0, figures["others"]
    assert len(figures["kinds"]) > 15
