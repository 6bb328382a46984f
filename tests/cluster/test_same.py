"""The same configuration, started in every way that one host has, ends in the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import MPICH, OPEN_MPI, ROOT, Ended, mpirun

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

QUIET = ("--log.tensorboard", "false", "--log.picture", "false", "--log.progress", "false", "--world.device", "cpu")
TRAIN = ("-m", "distloop", "train")
DIGITS = ("digits", "--train.epochs", "2", "--train.deterministic", "true", *QUIET, "--log.name", "run")


def outcome(folder: Path) -> tuple[str, float, int]:
    """Return the sha256 of the model's file, the last loss, and the number of ranks."""
    run = folder / "runs" / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [record["loss"] for record in records if record["kind"] == "train"][-1]
    ranks = json.loads((run / "run.json").read_text())["attempts"][0]["ranks"]
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(), loss, ranks


def start(folder: Path, *command: str, **variables: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | variables
    done = subprocess.run(
        [*command, *DIGITS], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def by_hand(folder: Path) -> None:
    start(folder, sys.executable, "-m", "distloop", "train")


def by_torchrun(folder: Path, ranks: int) -> None:
    start(folder, str(ROOT / "launch" / "torchrun.sh"), RANKS=str(ranks))


def by_plain_torchrun(folder: Path) -> None:
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    start(folder, sys.executable, "-m", *torchrun, "-m", "distloop", "train")


@pytest.mark.parametrize("strategy", ["default", "deterministic"])
def test_every_launcher_ends_in_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if strategy == "default":
        monkeypatch.setattr(sys.modules[__name__], "DIGITS", tuple("false" if w == "true" else w for w in DIGITS))
    ways = {
        "no launcher": by_hand,
        "torchrun 2": by_plain_torchrun,
        "launch/torchrun.sh 2": lambda folder: by_torchrun(folder, 2),
        "launch/torchrun.sh 4": lambda folder: by_torchrun(folder, 4),
    }
    rows, found = [], {}
    for mpi in (OPEN_MPI, MPICH):
        name = f"mpirun ({mpi.name}) 2"
        if (why := mpi.missing()) is not None:
            rows.append(f"{name:<24}not run: {why}")
        else:
            ways[name] = lambda folder, mpi=mpi: trained(mpirun(2, *TRAIN, *DIGITS, folder=folder, mpi=mpi))
    for name, run in ways.items():
        (folder := tmp_path / name.replace("/", " ")).mkdir()
        run(folder)
        found[name] = outcome(folder)
        digest, loss, ranks = found[name]
        rows.append(f"{name:<24}{ranks} rank{'s' if ranks > 1 else ' '}  loss {loss:.9f}  sha256 {digest[:12]}")
    with capsys.disabled():
        print(f"\n{strategy} mode\n" + "\n".join(rows))
    losses = [loss for _, loss, _ in found.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    if strategy == "deterministic":
        assert len({digest for digest, _, _ in found.values()}) == 1
    assert [ranks for _, _, ranks in found.values()][:4] == [1, 2, 2, 4]


def trained(done: Ended) -> None:
    assert done.code == 0, done.out + done.err
