"""A NaN on one rank is one decision of all: stop, or skip the update, and not for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distloop.errors import NonFiniteError
from distloop.transforms import Collected, SkipNonFinite
from tests.ranks import Ended, run_command

QUIET = ("--log.tensorboard", "false", "--log.picture", "false", "--data.global_batch_size", "30", "--log.name", "run")


def train(folder: Path, count: int, *settings: str) -> list[Ended]:
    """Train on two ranks, 12 steps, with a loss of NaN on rank 1 from step 4 on, ``count`` times."""
    folder.mkdir(exist_ok=True)
    arguments = ("train", "tests.faulty_tasks:Faulty", *QUIET, "--train.epochs", "3", "--log.every", "2", *settings)
    return run_command(*arguments, folder=folder, ranks=2, NAN_STEP="4", NAN_STEPS=str(count))


@pytest.mark.parametrize("strategy", ["naive", "ddp", "zero_offload"])
def test_a_nan_is_skipped_on_all_ranks_alike(tmp_path: Path, strategy: str) -> None:
    ends = train(tmp_path, 3, "--monitor.nonfinite", "skip", "--strategy.name", strategy)
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    result = json.loads((tmp_path / "runs/run/result.json").read_text())
    assert (result["steps"], result["skipped"]) == (12, 3)
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "runs/run/model.safetensors").values())


def test_a_skipped_update_is_as_if_the_batch_had_not_been(tmp_path: Path) -> None:
    """Momentum, weight decay and the count of updates stand still, too."""
    transform, updates = SkipNonFinite(2), []
    for value in (1.0, torch.nan, torch.inf, 2.0):
        stream = iter([(0, Collected([torch.ones(3)])), (1, Collected([torch.full((2,), value)]))])
        updates.append([i for i, _ in transform(stream, lambda amount: amount)])
    assert updates == [[1, 0], [], [], [1, 0]]
    assert not transform.overflowed and transform.in_a_row == 0


def test_too_many_in_a_row_are_an_error_on_all_ranks(tmp_path: Path) -> None:
    ends = train(tmp_path, 9, "--monitor.nonfinite", "skip", "--monitor.most_skipped", "3", "--strategy.name", "naive")
    assert [end.code for end in ends] == [13, 13]
    text = "".join(end.err for end in ends)
    assert text.count("distloop: ") == 1 and "in 4 steps in a row" in text
    with pytest.raises(NonFiniteError):
        list(SkipNonFinite(0)(iter([(0, Collected([torch.tensor([torch.nan])]))]), lambda amount: amount))


def test_it_stops_unless_told_to_skip(tmp_path: Path) -> None:
    ends = train(tmp_path, 1, "--strategy.name", "naive")
    assert [end.code for end in ends] == [13, 13]
    assert "the loss became nan at step 4" in "".join(end.err for end in ends)
