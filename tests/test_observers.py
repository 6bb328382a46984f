"""What observers show, and that a full disk does not end a training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from distloop.errors import ConfigError
from distloop.observers import make_observers
from distloop.observers.console import Console
from distloop.observers.curves import panels
from distloop.observers.files import JsonLines, LogFile, TensorBoard
from distloop.observers.pictures import LearningCurves
from distloop.observers.text import line
from distloop.records import Record

TRAIN = Record("train", 50, 0, {"loss": 0.5, "lr": 1e-3, "samples_per_second": 12345.6})
LATER = Record("train", 1000, 11, {"loss": 12.25, "lr": 1.25e-4, "samples_per_second": 345.0})
EVALUATE = Record("evaluate", 1000, 11, {"loss": 0.25, "accuracy": 0.975, "best": True})
END = Record(
    "end",
    1000,
    11,
    {
        "reason": "all epochs done",
        "steps": 1000,
        "epochs": 12,
        "seconds": 1.5,
        "samples_per_second": 100.0,
        "skipped": 2,
        "metrics": {"accuracy": 0.975},
        "last_metrics": {"loss": 0.5, "accuracy": 0.9},
        "best": 0.975,
        "best_metric": "accuracy",
        "best_step": 1000,
        "directory": ".",
    },
)


def test_lines_stand_under_each_other() -> None:
    one, other = line(TRAIN, 1000), line(LATER, 1000)
    assert one == "step   50/1000  epoch   1  loss    0.5000  lr     0.001  samples/s    12,346"
    assert [one.index(word) for word in ("epoch", "loss", "lr", "samples/s")] == [
        other.index(word) for word in ("epoch", "loss", "lr", "samples/s")
    ]
    assert line(EVALUATE).endswith("accuracy    0.9750  * best")
    assert "loss         -" in line(Record("train", 1, 0, {"loss": None}))


def test_json_lines_are_json_even_with_nan(tmp_path: Path) -> None:
    write = JsonLines(tmp_path / "metrics.jsonl")
    write(Record("train", 1, 0, {"loss": math.nan}))
    write(END)
    first, last = (json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] is None and first["step"] == 1
    assert last["kind"] == "end"


def test_a_file_that_cannot_be_written_is_given_up_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for write in (JsonLines(tmp_path / "no" / "metrics.jsonl"), LogFile(tmp_path / "no" / "rank_0.log")):
        write(TRAIN)
        write(END)
    assert capsys.readouterr().err.count("it gets no more lines") == 2
    full = LogFile(Path("/dev/full"))
    for record in (TRAIN, LATER, END):
        full(record)
    assert "No space left on device" in capsys.readouterr().err


def test_tensorboard_files_hold_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is an extra")
    board = TensorBoard(tmp_path)
    for record in (TRAIN, EVALUATE, END):
        board(record)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    assert b"train/loss" in content and b"evaluate/accuracy" in content and b"evaluate/best" not in content


def test_learning_curves_are_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    draw = LearningCurves(tmp_path / "curves.png")
    for record in (TRAIN, LATER, EVALUATE, END):
        draw(record)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    found = panels([draw.curves])
    assert list(found) == ["loss", "accuracy", "lr"]
    assert found["loss"] == [("train", "loss"), ("evaluate", "loss")]


def test_the_console_is_quiet_when_it_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(1000)
    assert not console.shows_progress
    for record in (Record("start", 0, 0, {"task": "digits"}), TRAIN, EVALUATE, END):
        console(record)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "task          digits" in out
    assert "last          loss 0.5000, accuracy 0.9000" in out
    assert "best          accuracy 0.9750 at step 1000" in out
    assert "2 updates that overflowed" in out


def test_a_progress_bar_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(10, progress=True)
    console(Record("start", 0, 0, {}))
    console.advance(5)
    console(END)
    out = capsys.readouterr().out
    assert " 5/10" in out and "all epochs done" in out


def test_other_ranks_write_their_log_alone(tmp_path: Path) -> None:
    observers, advance = make_observers(tmp_path, rank=2, total_steps=10, progress=True, tensorboard=True, picture=True)
    assert [type(o) for o in observers] == [LogFile] and advance is None


def test_a_missing_extra_is_one_sentence_with_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log\.picture: needs matplotlib: pip install 'distloop\[plots\]'"):
        make_observers(tmp_path, rank=0, total_steps=1, progress=None, tensorboard=None, picture=True)
    observers, _ = make_observers(tmp_path, rank=0, total_steps=1, progress=None, tensorboard=None, picture=None)
    assert [type(o) for o in observers] == [LogFile, JsonLines, Console]
