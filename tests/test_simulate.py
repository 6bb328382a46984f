"""``distloop train --simulate N``: what N processes do, in one, where it can be stepped through."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import distloop
from distloop.api import simulate
from distloop.errors import ConfigError
from distloop.settings import from_file, from_mapping, resolve
from distloop.tasks import TASKS
from tests.ranks import Ended, run_command

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.yaml")
QUIET = {"tensorboard": False, "picture": False, "every": 1}
ON_CLOCKS = {"time", "seconds", "samples_per_second", "directory", "idle"}


def records(run: Path) -> list[dict[str, Any]]:
    """Return what a run logged, but for what clocks say."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ON_CLOCKS} for row in rows if row["kind"] != "start"]


def simulated(folder: Path, ranks: int, name: str, **changes: dict[str, Any]) -> tuple[distloop.Result, Any]:
    own = changes | {"log": {"directory": str(folder), **QUIET}}
    resolved = resolve(from_file(ROOT / "configs" / f"{name}.yaml"), from_mapping(own))
    result = simulate(resolved, ranks)
    return result, records(result.directory)


def command(folder: Path, target: str, *settings: str, ranks: int = 1, **variables: str) -> Ended:
    quiet = ("--log.tensorboard", "false", "--log.picture", "false", "--log.every", "1", "--log.name", "run")
    ends = run_command(
        "train", target, *quiet, *settings, folder=folder, ranks=ranks, PYTHONPATH=str(ROOT), **variables
    )
    return ends[0]


SHORT = {"train": {"max_steps": 3}, "data": {"global_batch_size": 16}}
OPTIONS: dict[str, dict[str, Any]] = {
    "byte_lm": {"path": str(ROOT / "README.md"), "width": 32},
    "masked_lm": {"path": str(ROOT / "README.md"), "width": 32},
    "digits": {"model": "mlp", "dropout": 0.5},
    "gan": {"samples": 50},
    "modem": {"blocks": 2000, "validation_blocks": 2000},
}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_supplied_task_runs_the_same_way_twice(tmp_path: Path, name: str) -> None:
    changes = SHORT | {"task": OPTIONS.get(name, {})}
    (result, first), (_, second) = (simulated(tmp_path, 3, name, **changes) for _ in range(2))
    assert result.steps == 3
    assert len([row for row in first if row["kind"] == "train"]) >= 2
    assert first == second
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if t.name.startswith("rank")]


def test_losses_are_those_of_one_process(tmp_path: Path) -> None:
    changes = {"task": {"model": "mlp"}, "train": {"epochs": 1}, "data": {"global_batch_size": 130}}
    (_, alone), (_, three) = (simulated(tmp_path, ranks, "digits", **changes) for ranks in (1, 3))
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (alone, three)]
    assert len(losses[0]) == 13
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_numbers_are_those_of_as_many_processes(tmp_path: Path) -> None:
    """Dropout draws from a generator that a process has once: to the bit alike."""
    (tmp_path / "processes").mkdir()
    settings = ("--strategy.name", "naive", "--train.max_steps", "3", "--data.global_batch_size", "16")
    own = ("--task.model", "mlp", "--task.dropout", "0.5")
    end = command(tmp_path / "processes", DIGITS, *settings, *own, ranks=3)
    assert end.code == 0, end.err
    _, threads = simulated(tmp_path, 3, "digits", **SHORT | {"task": OPTIONS["digits"]})
    assert len(threads) >= 4
    processes = records(tmp_path / "processes" / "runs" / "run")
    for row in (*threads, *processes):
        row.pop("bytes", None)  # of a checkpoint, which also has paths and the name of the launcher
    assert threads == processes


def test_the_command(tmp_path: Path) -> None:
    end = command(tmp_path, DIGITS, "--simulate", "3", "--train.max_steps", "2", "--task.model", "mlp")
    assert (end.code, end.err) == (0, "")
    assert "3 ranks in one process, one at a time; strategy naive, because ddp, the default, needs processes" in end.out
    assert "3 ranks started by simulate on cpu\n" in end.out
    assert end.out.count("kept model") == 1, "rank 0 alone prints"
    run = tmp_path / "runs" / "run"
    assert {path.name for path in run.iterdir()} == {
        *("checkpoints", "config.yaml", "lock", "logs", "metrics.jsonl", "model.safetensors", "result.json", "run.json")
    }
    assert {path.name for path in (run / "logs").iterdir()} == {f"rank_{rank}.log" for rank in range(3)}
    assert resolve(from_file(run / "config.yaml")).config.strategy.name == "naive"


REFUSED = [
    (["--strategy.name", "ddp"], "strategy.name: this one works over torch.distributed alone"),
    (["--world.device", "cuda"], "command line --world.device: world.device: simulated ranks run on the CPU"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_a_mistake_is_one_sentence(tmp_path: Path, settings: list[str], message: str) -> None:
    end = command(tmp_path, DIGITS, *settings, "--simulate", "2")
    assert end.code == 2
    assert len(end.err.splitlines()) == 1 and message in end.err


def test_under_a_launcher_there_is_nothing_to_simulate(tmp_path: Path) -> None:
    end = command(tmp_path, DIGITS, "--simulate", "4", RANK="0", WORLD_SIZE="2")
    assert end.code == 2
    assert "--simulate 4 makes its ranks in one process, and torchrun started 2" in end.err
    assert command(tmp_path, DIGITS, "--simulate", "0").code == 2


def test_a_users_error_on_one_rank_is_the_one_that_is_raised(tmp_path: Path) -> None:
    resolved = resolve(
        from_mapping({"task": {"name": "tests.user_tasks:VectorLoss"}, "log": {"directory": str(tmp_path)}})
    )
    with pytest.raises(ConfigError, match="it must be a scalar"):
        simulate(resolved, 3)


def test_loader_processes_work(tmp_path: Path) -> None:
    changes = SHORT | {"task": {"model": "mlp"}}
    _, without = simulated(tmp_path, 2, "digits", **changes)
    _, read_ahead = simulated(tmp_path, 2, "digits", **changes | {"data": SHORT["data"] | {"workers": 1}})
    assert read_ahead == without


TASK = """
import os, signal, threading
import torch
from torch import nn
from torch.utils.data import TensorDataset
import distloop

calls = {}


def loss(guesses, targets):
    rank = threading.current_thread().name
    calls[rank] = calls.get(rank, 0) + 1
    if rank == "rank 1" and calls[rank] == 3:
        ACTION()
    return nn.functional.mse_loss(guesses, targets)


def Task(action):
    global ACTION
    ACTION = breakpoint if action == "stop" else lambda: os.kill(os.getpid(), signal.SIGINT)
    data = TensorDataset(torch.arange(24.0)[:, None] / 24, torch.zeros(24, 1))
    return distloop.Supervised(nn.Linear(1, 1), loss, data)
"""
SETTINGS = ("--data.global_batch_size", "6", "--log.every", "1", "--log.tensorboard", "false", "--log.picture", "false")


def of_ones_own(folder: Path, action: str, *settings: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "own.py").write_text(TASK)
    words = ["own:Task", "--simulate", "3", "--task.action", action, "--log.name", "run", *SETTINGS, *settings]
    return subprocess.run(
        [sys.executable, "-m", "distloop", "train", *words],
        input=typed,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_breakpoint_on_one_rank_holds_all(tmp_path: Path) -> None:
    typed = [
        "p 'here', threading.current_thread().name, calls",
        "import time; time.sleep(0.3)",  # the others would be far ahead by now
        "p 'still', calls",
        "up",
        "p 'guesses', tuple(guesses.shape)",
        "continue",
    ]
    done = of_ones_own(tmp_path, "stop", "--train.epochs", "2", typed="\n".join(typed) + "\n")
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"\('here', 'rank 1', (\{.*?\})\)", done.stdout)
    assert found is not None, done.stdout
    assert f"('still', {found[1]})" in done.stdout, "nobody went on"
    counts = ast.literal_eval(found[1])
    assert counts["rank 1"] == 3 and set(counts) == {"MainThread", "rank 1", "rank 2"}
    assert all(2 <= count <= 3 for count in counts.values()), "the others are at the same step, or waiting for it"
    assert "('guesses', (2, 1))" in done.stdout
    assert "all epochs done, after 8 steps" in done.stdout


def test_who_quits_the_debugger_ends_the_run(tmp_path: Path) -> None:
    done = of_ones_own(tmp_path, "stop", typed="quit\n")
    assert done.returncode == 1
    assert "BdbQuit" in done.stderr
    for rank in (0, 2):
        log = (tmp_path / "runs" / "run" / "logs" / f"rank_{rank}.log").read_text()
        assert "rank 1 failed with BdbQuit" in log.splitlines()[-1]


def test_ctrl_c_ends_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    done = of_ones_own(tmp_path, "interrupt", "--train.epochs", "100000")
    assert done.returncode == 75, done.stdout + done.stderr
    assert "interrupted (Ctrl-C)" in done.stdout
    run = tmp_path / "runs" / "run"
    steps = json.loads((run / "result.json").read_text())["steps"]
    for rank in range(3):
        lines = (run / "logs" / f"rank_{rank}.log").read_text().splitlines()
        assert [line for line in lines if line.endswith(f"end: steps: {steps}")], lines[-5:]
