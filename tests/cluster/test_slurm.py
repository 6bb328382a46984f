"""slurm/*.sbatch under a real slurmctld and slurmd: the same bits as elsewhere, and on through whatever stops a job."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import KILL_WAIT, Slurm, missing
from tests.ranks import ROOT, run_command
from tests.restarting import BATCH, DETERMINISTIC, PER_EPOCH, SAMPLES, SETTINGS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

QUIET = ("--log.tensorboard", "false", "--log.picture", "false", "--log.progress", "false")
DIGITS = ("digits", "--train.epochs", "2", "--train.deterministic", "true", "--world.device", "cpu", *QUIET)
EPOCHS = 8
STEPS = EPOCHS * PER_EPOCH
TASK = "tests.cluster.task:Restarted"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if (why := missing()) is not None:
        pytest.skip(why)
    with Slurm(nodes=2) as cluster:
        yield cluster


def submit(
    slurm: Slurm, script: str, folder: Path, *arguments: str, options: tuple[str, ...] = (), **variables: str
) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANKS": "2", "RUN": "run"}
    words = (*options, str(ROOT / "slurm" / script), *arguments)
    return slurm.submit(*words, folder=folder, **(given | variables))


def said(folder: Path) -> str:
    """Return what jobs have said, for who looks for what went wrong."""
    paths = [*folder.glob("slurm-*.out"), *folder.glob("slurm-logs/*/*.log")]
    return "\n".join(f"{path}:\n{path.read_text()}" for path in paths)


# -- the same, however it is started ----------------------------------------------------------------------------------


def outcome(run: Path) -> tuple[str, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [record["loss"] for record in records if record["kind"] == "train"][-1]
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(), loss


def test_two_nodes_train_to_the_same_bits_as_one_process(slurm: Slurm, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    assert run_command("train", *DIGITS, "--log.name", "run", folder=alone)[0].code == 0
    expected = outcome(alone / "runs" / "run")
    for script in ("train.sbatch", "torchrun.sbatch"):
        folder = tmp_path / f"{script} ü"
        folder.mkdir()
        job = submit(slurm, script, folder, *DIGITS)
        try:
            slurm.wait(job, "COMPLETED", 120)
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{said(folder)}") from failure
        assert outcome(folder / "runs" / "run") == expected, script
        assert json.loads((folder / "runs" / "run" / "run.json").read_text())["attempts"][0]["ranks"] == 4


# -- on through whatever stops a job ----------------------------------------------------------------------------------


def journal(folder: Path) -> dict[int, dict[int, list[int]]]:
    """Return the samples of each step, by attempt."""
    found: dict[int, dict[int, list[int]]] = {}
    for path in sorted((folder / "journals").glob("*.jsonl")):
        for text in path.read_bytes().splitlines(keepends=True):
            line = json.loads(text) if text.endswith(b"\n") else {}
            if "step" in line:
                found.setdefault(line["attempt"], {}).setdefault(line["step"], []).extend(line["ids"])
    return found


def assert_each_sample_once(folder: Path, epochs: int) -> None:
    """Follow the line of attempts that led to the end: one counts up to where the next one began."""
    history: dict[int, list[int]] = {}
    attempts = journal(folder)
    assert len(attempts) > 1, "it was not stopped"
    for steps in attempts.values():
        history = {step: ids for step, ids in history.items() if step < min(steps)} | steps
    assert sorted(history) == list(range(1, epochs * PER_EPOCH + 1))
    for epoch in range(epochs):
        ids = [i for step in range(PER_EPOCH) for i in history[epoch * PER_EPOCH + step + 1]]
        assert Counter(ids) == Counter(range(SAMPLES)), f"epoch {epoch}"
    assert {len(ids) for ids in history.values()} <= {BATCH, SAMPLES % BATCH}


def until(condition: Callable[[], object], seconds: float, folder: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.1)


def start(slurm: Slurm, script: str, folder: Path, *options: str, epochs: int = EPOCHS, **variables: str) -> str:
    (folder / "journals").mkdir(parents=True, exist_ok=True)
    settings = SETTINGS | DETERMINISTIC | {"train.epochs": epochs}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    variables |= {"JOURNAL": str(folder / "journals")}
    return submit(slurm, script, folder, TASK, *words, options=options, **variables)


def warn(slurm: Slurm, job: str) -> None:
    slurm.call("scancel", "--signal=USR1", job)


def requeue(slurm: Slurm, job: str) -> None:
    slurm.call("scontrol", "requeue", job)


def take_down(slurm: Slurm, job: str) -> None:
    slurm.call("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    time.sleep(2)
    slurm.call("scontrol", "update", "NodeName=node2", "State=RESUME", check=False)  # it may be back by itself


@pytest.mark.parametrize(
    ("script", "harm"),
    [
        ("train.sbatch", warn),
        ("torchrun.sbatch", warn),
        ("train.sbatch", requeue),
        ("torchrun.sbatch", requeue),
        ("train.sbatch", take_down),
    ],
)
def test_a_stopped_job_goes_on(slurm: Slurm, tmp_path: Path, script: str, harm: Callable[[Slurm, str], None]) -> None:
    job = start(slurm, script, tmp_path)
    for number in range(2):
        until(lambda: len(journal(tmp_path).get(number, ())) > 8, 100, tmp_path)  # noqa: B023
        harm(slurm, job)
        until(lambda: slurm.about(job, "Restarts") == str(number + 1), 60, tmp_path)  # noqa: B023
    try:
        slurm.wait(job, "COMPLETED", 150)
    except AssertionError as failure:
        raise AssertionError(f"{failure}\n{said(tmp_path)}") from failure
    assert "Traceback" not in said(tmp_path)
    assert_each_sample_once(tmp_path, EPOCHS)


@pytest.mark.parametrize("script", ["train.sbatch", "torchrun.sbatch"])
def test_a_cancelled_job_has_saved_and_another_goes_on(slurm: Slurm, tmp_path: Path, script: str) -> None:
    job = start(slurm, script, tmp_path)
    until(lambda: len(journal(tmp_path).get(0, ())) > 8, 100, tmp_path)
    slurm.call("scancel", job)
    result = tmp_path / "runs" / "run" / "result.json"
    until(result.exists, KILL_WAIT, tmp_path)
    assert json.loads(result.read_text())["exit_code"] == 75
    slurm.wait(job, "CANCELLED", 30)
    assert slurm.about(job, "Restarts") == "0"
    other = start(slurm, script, tmp_path, FIRST="1")
    slurm.wait(other, "COMPLETED", 150)
    assert_each_sample_once(tmp_path, EPOCHS)


@pytest.mark.timeout(600)
def test_the_warning_before_the_limit_comes_in_time(slurm: Slurm, tmp_path: Path) -> None:
    epochs = 60  # longer than until the warning, which comes up to a minute early
    job = start(slurm, "train.sbatch", tmp_path, "--time=2", "--signal=USR1@60", epochs=epochs)
    slurm.wait(job, "COMPLETED", 540)
    assert int(slurm.about(job, "Restarts")) >= 1
    assert_each_sample_once(tmp_path, epochs)
