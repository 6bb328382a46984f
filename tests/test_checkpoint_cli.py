"""``distloop checkpoint`` as users see it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import distloop.failure
from distloop.checkpoint_cli import checkpoint
from distloop.checkpoints import Checkpoints, Stored
from tests.checkpoint_mutations import save
from tests.crashing_disk import QuickDisk


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = Checkpoints(tmp_path / "checkpoints", QuickDisk())
    (tmp_path / "checkpoints").mkdir()
    for step in (110, 120):
        save(store, step)
    return tmp_path


@pytest.fixture(autouse=True)
def _ends_softly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distloop.failure, "leave", lambda code: (_ for _ in ()).throw(SystemExit(code)))


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(checkpoint, [str(argument) for argument in arguments])


def damage(run: Path) -> None:
    model = run / "checkpoints" / "step-00000120" / "model-00000.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(bytes(data))


def test_list_and_verify_tell_which_is_damaged(run: Path) -> None:
    done = call("verify", run)
    assert done.exit_code == 0 and done.stdout.count(": valid, 4 files, 6 tensors") == 2
    damage(run)
    done = call("list", run)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["step", "time", "size", "files", "tensors"]
    assert lines[1].startswith("110 ") and lines[1].endswith(" valid")
    assert lines[2].startswith("120 ") and "model-00000.safetensors: its content has changed" in lines[2]
    done = call("verify", run)
    assert done.exit_code == 20 and "step-00000110: valid" in done.stdout
    assert done.stderr.count("distloop: ") == 1 and "its content has changed" in done.stderr
    assert call("verify", run / "checkpoints" / "step-00000110").exit_code == 0
    assert call("verify", run / "checkpoints" / "step-00000120").exit_code == 20
    assert (run / "checkpoints" / "step-00000120").is_dir(), "nothing is moved"


def test_show_takes_the_newest_valid_one(run: Path) -> None:
    done = call("show", run)
    assert done.exit_code == 0 and ": step 120, " in done.stdout and done.stderr == ""
    for words in ("strategy  ring", "ranks.0.generator", "loss", "float32", "[3, 4, 5, 2]", "bfloat16"):
        assert words in done.stdout
    damage(run)
    done = call("show", run)
    assert done.exit_code == 0 and ": step 110, " in done.stdout
    assert "damaged, the one before is taken: " in done.stderr
    assert (run / "checkpoints" / "step-00000120").is_dir(), "nothing is moved"


def test_diff_names_what_differs_and_by_how_much(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, QuickDisk())
    common = Stored("same", torch.ones(3))
    w = torch.arange(5.0)
    for step, tensors, more in (
        (1, [Stored("w", w), Stored("gone", w), Stored("kind", w)], {"rate": 0.5}),
        (2, [Stored("w", w + torch.tensor([0, 0, 0.25, 0, -2])), Stored("kind", w.int())], {"rate": 0.25, "new": None}),
    ):
        draft = store.draft(step, "t")
        draft.write("model.safetensors", [common, *tensors])
        draft.report(0, None)
        draft.commit(1, {"step": step} | more, {"strategy": "ring", "world": step}, timeout=1)
    done = call("diff", store.path(1), store.path(2))
    assert done.exit_code == 0, done.output
    told = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert {"fact world 1 2", "state step 1 2", "state rate 0.5 0.25", "state new - null"} <= told
    assert {"w 2 of 5 elements, by 2 at most", "gone only in the first", "kind float32 [5] and int32 [5]"} <= told
    assert "1 tensors are equal in every bit, 3 are not" in told and "strategy" not in done.stdout
    done = call("diff", store.path(1), store.path(1))
    assert done.stdout.splitlines()[1:] == ["4 tensors are equal in every bit, 0 are not"]


def test_export_is_a_plain_state_dict(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.conv = torch.nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)

    model, store = Tied(), Checkpoints(tmp_path / "checkpoints", QuickDisk())
    conv = model.conv.weight.permute(0, 2, 3, 1).reshape(-1).detach()
    for rank in range(2):
        draft = store.draft(3, "t")
        cut = Stored("conv.weight", conv[12 * rank : 12 * rank + 12], (3, 2, 2, 2), 12 * rank, (0, 2, 3, 1))
        rest = [Stored("embed.weight", model.embed.weight), Stored("conv.bias", model.conv.bias)] if rank == 0 else []
        draft.write(f"model-{rank}.safetensors", [cut, *rest], {"head.weight": "embed.weight"})
        draft.write(f"optim-{rank}.safetensors", [Stored(f"conv.weight/m{rank}", torch.ones(2))])
        draft.report(rank, None)
    draft.commit(2, {}, {}, timeout=1)

    assert call("export", tmp_path, tmp_path / "out.pt").exit_code == 0
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    other = Tied()
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert state["head.weight"] is not None and state["conv.weight"].is_contiguous()

    assert call("export", tmp_path / "checkpoints" / "step-00000003", tmp_path / "out.safetensors").exit_code == 0
    flat = load_file(tmp_path / "out.safetensors")
    assert sorted(flat) == ["conv.bias", "conv.weight", "embed.weight"]
    assert torch.equal(flat["conv.weight"], model.conv.weight)

    assert call("export", tmp_path, tmp_path / "all.pt", "--optimizer").exit_code == 0
    both = torch.load(tmp_path / "all.pt", weights_only=True)
    assert sorted(both["optimizer"]["conv.weight"]) == ["m0", "m1"] and "embed.weight" in both["model"]
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name]


def test_mistakes_are_one_sentence(run: Path, tmp_path: Path) -> None:
    for arguments, code, said in (
        (("list", run / "nowhere"), 20, "is no directory of a run"),
        (("show", run / "checkpoints" / "step-00000999"), 20, "is missing"),
        (("export", run, run / "model.bin"), 2, "the name of an export ends in .safetensors, .pt, .pth"),
        (("export", run, run / "none" / "model.pt"), 21, "cannot be written: No such file or directory"),
    ):
        done = call(*arguments)
        assert done.exit_code == code, done.output
        assert said in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert call("verify", tmp_path / "empty").exit_code == 20
