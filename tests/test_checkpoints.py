"""Checkpoints on one host: what goes in comes out, from any number of ranks; names, parts, retention, the lock."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save_file as save_safetensors

from distloop.checkpoints import Checkpoint, Checkpoints, RunLock, Stored, text
from distloop.checkpoints.tensors import DTYPES
from distloop.errors import BusyError, CheckpointError, NoCheckpointError, StorageError
from tests.checkpoint_mutations import save
from tests.crashing_disk import QuickDisk

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", QuickDisk())


def commit(store: Checkpoints, step: int, *tensors: Stored, **state: Any) -> Checkpoint:
    draft = store.draft(step, "t")
    draft.write("model.safetensors", tensors)
    draft.report(0, None)
    return draft.commit(1, state, {}, timeout=1)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_every_dtype_and_shape_comes_back_in_its_bits(store: Checkpoints) -> None:
    drawn = torch.randint(0, 255, (48,), dtype=torch.uint8)
    put = {name: (drawn % 2 if name == "BOOL" else drawn).view(dtype).view(2, -1) for name, dtype in DTYPES.items()}
    put |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "turned": torch.randn(3, 5).T}
    commit(store, 1, *[Stored(name, tensor) for name, tensor in put.items()])
    found = store.newest()
    assert found is not None and list(found.tensors) and set(found.tensors) == set(put)
    for name, tensor in put.items():
        back = found.read(name)
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert bits(back) == bits(tensor), name


def test_the_models_file_is_for_any_tool(store: Checkpoints) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model(torch.randn(5, 3))
    made = commit(store, 7, *[Stored(name, value) for name, value in model.state_dict().items()])
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    other.load_state_dict(load_file(made.path / "model.safetensors"))
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_cuts_of_any_number_of_ranks_are_put_together(ranks: int, store: Checkpoints) -> None:
    image = torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last)
    order, plain = (0, 2, 3, 1), torch.randn(11, 3)
    drafts = [store.draft(3, "t") for _ in range(ranks)]
    for rank, draft in enumerate(drafts):
        tensors = []
        for name, tensor, by in (("image", image.permute(order), order), ("plain", plain, None)):
            flat, shape = tensor.reshape(-1), tuple((image if by else plain).shape)
            a, b = rank * len(flat) // ranks, (rank + 1) * len(flat) // ranks
            tensors += [Stored(name, flat[a:b], shape, a, by), Stored(name, flat[b:b], shape, b, by)]
        draft.write(f"model-{rank:05d}.safetensors", tensors)
        draft.report(rank, rank)
    found = drafts[0].commit(ranks, {}, {}, timeout=1, verify=True)
    assert found.state["ranks"] == list(range(ranks))
    assert torch.equal(found.read("image"), image) and found.read("image").stride() == image.stride()
    assert torch.equal(found.read("plain"), plain)
    flat = image.permute(order).reshape(-1)
    for a, b in ((0, 120), (0, 0), (59, 61), (17, 103), (120, 120)):
        assert torch.equal(found.read_range("image", a, b), flat[a:b])
    with pytest.raises(CheckpointError, match="has no elements 5:121, only 120"):
        found.read_range("image", 5, 121)
    with pytest.raises(CheckpointError, match="has no tensor 'images'"):
        found.read("images")


def test_ranks_that_are_threads_write_at_once(store: Checkpoints) -> None:
    values, failures = torch.randn(8, 1000), []

    def rank_(rank: int) -> None:
        try:
            draft = store.draft(9, "t")
            draft.write(f"model-{rank}.safetensors", [Stored("w", values[rank], (8, 1000), 1000 * rank)])
            draft.report(rank, {"rank": rank})
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=rank_, args=(rank,)) for rank in range(1, 8)]
    for thread in threads:
        thread.start()
    rank_(0)
    found = store.draft(9, "t").commit(8, {}, {}, timeout=20)
    for thread in threads:
        thread.join()
    assert not failures and torch.equal(found.read("w"), values)
    assert [own["rank"] for own in found.state["ranks"]] == list(range(8))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["nan", "'nan", "-inf", "'"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=20,
)


@given(json_values)
def test_state_comes_back_as_it_was(value: Any) -> None:
    assert repr(text.decode(text.encode(value, "state"))) == repr(value)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": {"b": [0, {1}]}}, r"state.json.a.b\[1\]: is a set"),
        ({"a": {3: 1}}, "state.json.a: key 3 is a int"),
        ({"a": torch.ones(1)}, "state.json.a: is a Tensor"),
        ({"a": 10**5000}, "state.json: cannot be written as JSON: Exceeds the limit"),
        ({"ranks": 1}, "'ranks', which is for"),
    ],
)
def test_state_that_json_does_not_hold_is_named(state: Any, said: str, store: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match=said):
        commit(store, 1, Stored("w", torch.ones(2)), **state)
    assert store.disk.names(store.directory) == []


def loop() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


def test_state_without_end_is_refused(store: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="nested deeper than 50 levels"):
        commit(store, 1, Stored("w", torch.ones(2)), a=loop())


W = torch.arange(6.0)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([Stored("", W)], "a name is of printable characters"),
        ([Stored("w[0:3]", W)], "a name is of printable characters, and does not end as a cut"),
        ([Stored("__metadata__", W)], "a name is"),
        ([Stored("w", W), Stored("w", W)], "'w': is given twice"),
        ([Stored("w", torch.ones(2, dtype=torch.complex128))], "complex128 .* has no place in safetensors"),
        ([Stored("w", torch.ones(2).to_sparse())], "has no place in safetensors"),
        ([Stored("w", torch.ones(2, device="meta"))], "has no place in safetensors"),
        ([Stored("w", W, None, 0)], "a cut has one dimension, and says the shape"),
        ([Stored("w", W.view(2, 3), (2, 3), 0)], "a cut has one dimension"),
        ([Stored("w", W, (2, 3), 1)], r"w\[1:7\] is not within its 6 elements"),
        ([Stored("w", W, (2, 3), 0, (0, 0))], r"order \(0, 0\) does not order 2 dimensions"),
        ([Stored("w", W, (2, 3))], r"has shape \(6,\); \(2, 3\) is said"),
        (
            [Stored("w", W[:2], (2, 3), 0), Stored("w", W[3:], (2, 3), 3)],
            "do not follow each other: 2 is followed by 3",
        ),
        (
            [Stored("w", W[:4], (2, 3), 0), Stored("w", W[3:], (2, 3), 3)],
            "do not follow each other: 4 is followed by 3",
        ),
        ([Stored("w", W[:4], (2, 3), 0)], "up to 4; it has 6 elements"),
        ([Stored("w", W), Stored("w", W, (6,), 0)], "is stored whole, and once more"),
        ([Stored("w", W[:3], (2, 3), 0), Stored("w", W[3:], (3, 2), 3)], "is .* elsewhere"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors: list[Stored], said: str, store: Checkpoints) -> None:
    commit(store, 1, Stored("w", W))
    draft = store.draft(2, "t")
    with pytest.raises(CheckpointError, match=said):
        try:
            draft.write("model.safetensors", tensors)
            draft.report(0, None)
        except CheckpointError:
            draft.discard()
            raise
        draft.commit(1, {}, {}, timeout=1)
    assert store.disk.names(store.directory) == ["step-00000001"]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/b.safetensors", "X.safetensors", "", "a..safetensors", ".a.safetensors", "model"]
)
def test_no_file_of_a_draft_has_a_name_that_leads_out(name: str, store: Checkpoints) -> None:
    draft = store.draft(1, "t")
    with pytest.raises(CheckpointError, match=r"is no name for a checkpoint's file|ends in \.safetensors"):
        draft.write(name, [])
    with pytest.raises(CheckpointError, match="has no name"):
        store.draft(1, "../../x")


def test_ranks_that_failed_or_do_not_answer_are_named(store: Checkpoints) -> None:
    def three() -> list[Any]:
        drafts = [store.draft(5, "t") for _ in range(3)]
        drafts[0].report(0, None)
        return drafts

    with pytest.raises(StorageError, match=r"ranks 1, 2 did not finish writing within 0\.05 s"):
        three()[0].commit(3, {}, {}, timeout=0.05)
    drafts = three()
    drafts[2].fail(2, "No space left on device")
    with pytest.raises(StorageError, match=r"rank 2 could not write its part .*: No space left on device"):
        drafts[0].commit(3, {}, {}, timeout=20)
    drafts = three()
    drafts[1].report(1, None)
    with pytest.raises(StorageError, match="given up, as asked, before rank 2 had written"):
        drafts[0].commit(3, {}, {}, timeout=20, stop=lambda: True)
    assert store.disk.names(store.directory) == []
    drafts[2].fail(2, "too late")  # and says nothing
    with pytest.raises(StorageError, match="No such file or directory"):
        drafts[2].write("late.safetensors", [Stored("w", W)])


def test_a_checkpoint_is_never_written_over(store: Checkpoints) -> None:
    commit(store, 5, Stored("w", W), n=1)
    with pytest.raises(CheckpointError, match="is there already; a checkpoint is never written over"):
        commit(store, 5, Stored("w", W), n=2)
    found = store.newest()
    assert found is not None and found.state["n"] == 1 and store.disk.names(store.directory) == ["step-00000005"]


def test_a_finished_file_is_linked_and_one_that_is_none_is_refused(store: Checkpoints, tmp_path: Path) -> None:
    source = tmp_path / "best.safetensors"
    save_safetensors({"w": W, "b": torch.ones(2, dtype=torch.bfloat16)}, source, metadata={"tied": "w"})
    draft = store.draft(5, "t")
    draft.link("model.safetensors", source)
    draft.report(0, None)
    found = draft.commit(1, {}, {}, timeout=1)
    assert torch.equal(found.read("w"), W) and found.metadata["model.safetensors"]["tied"] == "w"
    assert (found.path / "model.safetensors").samefile(source)
    (tmp_path / "alias.safetensors").symlink_to(source)
    with pytest.raises(StorageError, match="Too many levels of symbolic links"):
        store.draft(6, "t").link("model.safetensors", tmp_path / "alias.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"hello, this is no header")
    with pytest.raises(CheckpointError, match=r"has a header of .* bytes; at most"):
        store.draft(7, "t").link("model.safetensors", tmp_path / "x.safetensors")


class NoLinks(QuickDisk):
    def link(self, source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_where_there_are_no_links_a_file_is_copied(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints", NoLinks())
    save_safetensors({"w": W}, tmp_path / "best.safetensors")
    draft = store.draft(5, "t")
    draft.link("model.safetensors", tmp_path / "best.safetensors")
    draft.report(0, None)
    found = draft.commit(1, {}, {}, timeout=1)
    assert torch.equal(found.read("w"), W)
    assert not (found.path / "model.safetensors").samefile(tmp_path / "best.safetensors")


def test_the_newest_valid_one_is_taken_and_damaged_ones_set_aside(store: Checkpoints) -> None:
    assert store.newest() is None
    for step in (10, 20, 30):
        save(store, step)
    for step, name in ((20, "state.json"), (30, "model-00000.safetensors")):
        with (store.path(step) / name).open("ab") as file:
            file.write(b" ")
    assert store.newest(set_aside=False) is not None and store.steps() == [10, 20, 30]
    found = store.newest()
    assert found is not None and found.step == 10 and store.steps() == [10]
    assert [name for name, _ in store.damaged] == ["step-00000030", "step-00000020"]
    assert (
        "model-00000.safetensors: has 1033 bytes" in store.damaged[0][1] and "MANIFEST.json says" in store.damaged[0][1]
    )
    aside = store.directory / "quarantine"
    assert "state.json: has" in (aside / "step-00000020.reason.txt").read_text()
    (save(store, 20).path / "COMMIT").write_text("0" * 64)
    assert store.newest() is not None and (aside / "step-00000020.2").is_dir()


def test_if_none_is_valid_it_is_an_error_now_and_at_the_next_start(store: Checkpoints) -> None:
    for step in (10, 20):
        (save(store, step).path / "COMMIT").unlink()
    for _ in range(2):
        with pytest.raises(
            NoCheckpointError, match=r"none of its checkpoints is valid: .*COMMIT: is missing"
        ) as caught:
            store.newest()
        assert caught.value.exit_code == 20
        assert store.steps() == [10, 20]
    other = Checkpoints(store.directory.parent / "other")
    (other.directory / "step-12").mkdir(parents=True)
    with pytest.raises(NoCheckpointError, match="is not named as a checkpoint is"):
        other.newest()


def test_files_of_the_dead_are_removed_at_the_start(store: Checkpoints, tmp_path: Path) -> None:
    save(store, 10)
    store.draft(20, "dead").write("model.safetensors", [Stored("w", W)])
    (store.directory / ".trash-00000005-1").mkdir()
    (tmp_path / "mine").mkdir()
    (store.directory / ".tmp-link").symlink_to(tmp_path / "mine")
    store.clean()
    assert store.disk.names(store.directory) == ["step-00000010"] and (tmp_path / "mine").is_dir()


@given(
    steps=st.dictionaries(st.integers(1, 30), st.sampled_from(["valid", "valid", "damaged", "cut"]), max_size=7),
    last=st.integers(0, 4),
    every=st.none() | st.integers(1, 6),
    best=st.sets(st.integers(1, 30), max_size=2),
    reading=st.none() | st.integers(1, 30),
    again=st.booleans(),
)
def test_retention_keeps_what_must_be_kept(
    tmp_path_factory: pytest.TempPathFactory,
    steps: dict[int, str],
    last: int,
    every: int | None,
    best: set[int],
    reading: int | None,
    again: bool,
) -> None:
    store = Checkpoints(tmp_path_factory.mktemp("retain"), QuickDisk())
    for step in steps:
        commit(store, step, Stored("w", W))
    if again:  # as another process finds them
        store = Checkpoints(store.directory, QuickDisk())
    for step, how in steps.items():
        model = store.path(step) / "model.safetensors"
        if how == "damaged":
            store._known.discard(step)
            model.write_bytes(model.read_bytes()[:-1] + b"?")
        elif how == "cut":
            model.write_bytes(model.read_bytes()[:-1])
    valid = [step for step in sorted(steps) if steps[step] == "valid"]
    removed = store.retain(last=last, every=every, best=best, reading=reading)
    left = set(store.steps())
    assert left == set(steps) - set(removed)
    assert not store.disk.names(store.directory)[0].startswith(".") if left else not steps
    assert not set(removed) & (best | {reading})
    assert not any(step % every == 0 for step in removed) if every else True
    if not valid:
        assert not removed
        return
    assert valid[-1] in left and all(step < valid[-1] for step in removed)
    whole = [step for step in sorted(steps) if steps[step] != "cut" and step <= valid[-1]]
    kept = set(whole[-max(last, 1) :])
    assert kept <= left
    assert left == kept | {s for s in steps if s in best | {reading} or s > valid[-1] or (every and s % every == 0)}


@pytest.mark.alone
def test_the_lock_names_its_holder_within_two_seconds_and_dies_with_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from distloop.checkpoints import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]), job='4711'); print(lock.note, flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout is not None and holder.stdin is not None
    try:
        assert holder.stdout.readline() == "None\n"
        began = time.monotonic()
        with pytest.raises(BusyError, match=rf"another job works here: process {holder.pid} on .*, job 4711, since 20"):
            RunLock(tmp_path)
        assert time.monotonic() - began < 2
        assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    with RunLock(tmp_path) as lock:
        assert lock.note is None and json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    RunLock(tmp_path).release()


def test_a_process_forked_from_the_holder_does_not_hold_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    done, tell = os.pipe()
    child = os.fork()
    if child == 0:  # as a loader's worker that outlives its parent
        os.read(done, 1)
        os._exit(0)
    try:
        os.close(lock._descriptor or -1)  # as if this process had ended
        lock._descriptor = None
        RunLock(tmp_path).release()
    finally:
        os.write(tell, b"x")
        os.waitpid(child, 0)
        os.close(done)
        os.close(tell)


def test_where_there_are_no_locks_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(tmp_path) as lock:
        assert lock.note is not None and "No locks available: nothing keeps a second job out" in lock.note
    monkeypatch.undo()
    with pytest.raises(StorageError, match="lock: cannot be made: No such file or directory"):
        RunLock(tmp_path / "nowhere")


def test_state_of_a_run_is_not_changed_by_its_way(store: Checkpoints) -> None:
    found = commit(store, 1, Stored("w", W), loss=math.nan, best=-math.inf, name="nan", tiny=5e-324, third=1 / 3)
    again = store.open(found.path)
    for made in (found, again):
        assert math.isnan(made.state["loss"]) and made.state["best"] == -math.inf and made.state["name"] == "nan"
        assert (made.state["tiny"], made.state["third"]) == (5e-324, 1 / 3)
    quick = store.open(found.path, contents=False)
    assert again.digest == found.digest == quick.digest == (found.path / "COMMIT").read_text().strip()
    assert again.manifest == found.manifest and again.tensors == found.tensors
