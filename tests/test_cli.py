"""The commands as users see them: output, one sentence for each mistake, exit codes, on one rank and on several."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import run_command, script

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.yaml")
ONE_MISSING = f"rank 1 of 2 did not come (here: 0 on {socket.gethostname()}) within 2 s (world.timeout)"
SHORT = ("--train.epochs", "1", "--log.tensorboard", "false", "--log.picture", "false")


def train(folder: Path, target: str, *settings: str, ranks: int = 1, **variables: str) -> tuple[list[int], str, str]:
    """Return the exit codes, and what all ranks printed to stdout and to stderr."""
    ends = run_command("train", target, *settings, folder=folder, ranks=ranks, PYTHONPATH=str(ROOT), **variables)
    return [end.code for end in ends], "".join(end.out for end in ends), "".join(end.err for end in ends)


def sentences(err: str) -> list[str]:
    assert "Traceback" not in err, err
    return [line for line in err.splitlines() if line.startswith("distloop: ")]


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys, distloop.cli; print(sorted(m for m in sys.modules if m in ('torch', 'pydantic', 'rich', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_one_process(tmp_path: Path) -> None:
    codes, out, err = train(tmp_path, DIGITS, *SHORT)
    assert codes == [0], err
    assert "step 23/23" in out and "kept model    loss" in out and "results" in out
    assert err == ""


@pytest.mark.parametrize("strategy", ["ddp", "naive"])
def test_ranks_say_what_one_process_says(tmp_path: Path, strategy: str) -> None:
    figures = []
    for ranks in (1, 3):
        codes, out, err = train(
            tmp_path, DIGITS, *SHORT, "--strategy.name", strategy, "--log.name", f"r{ranks}", ranks=ranks
        )
        assert codes == [0] * ranks, err
        assert out.count("kept model") == 1, "rank 0 alone prints"
        result = json.loads((tmp_path / "runs" / f"r{ranks}" / "result.json").read_text())
        figures.append(result["metrics"]["loss"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def torchrun(folder: Path, *arguments: str) -> str:
    """Return what two ranks started by torchrun print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=100, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    assert "2 ranks started by torchrun" in torchrun(
        tmp_path, "-m", "distloop", "train", DIGITS, "--optimizer.lr", "0.003"
    )
    (run,) = (tmp_path / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["best"] >= 0.97, "the main job's promise"
    assert {"config.yaml", "curves.png", "logs", "metrics.jsonl", "model.safetensors", "result.json"} <= {
        path.name for path in run.iterdir()
    }


TWICE = """
import torch, distloop
from torch import nn
from torch.utils.data import TensorDataset

for strategy in ("ddp", "naive"):
    torch.manual_seed(0)  # ranks with different data are refused
    data = TensorDataset(torch.randn(20, 4), torch.arange(20) % 2)
    task = distloop.Supervised(nn.Linear(4, 2), nn.CrossEntropyLoss(), data)
    result = distloop.fit(task, train={"epochs": 1}, strategy={"name": strategy}, log={"picture": False})
    print(f"steps {result.steps}", flush=True)
"""


def test_a_process_may_train_twice(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(TWICE)
    ends = run_command("twice.py", folder=tmp_path, ranks=2, main=script)
    assert [end.code for end in ends] == [0, 0], ends[0].err
    assert [end.out.count("steps 1") for end in ends] == [2, 2]


MISTAKES = [
    ("missing.yaml", [], 2, "missing.yaml: there is no such file"),
    ("digit", [], 2, "'digit' is neither a file nor a supplied task (did you mean 'digits'?)"),
    (DIGITS, ["--lr", "1"], 2, "did you mean optimizer.lr?"),
    ("--train.epochs", ["1"], 2, "settings come behind it"),
    (":Fine", [], 2, "is not of the form package.module:Name"),
    ("tests.user_tasks:RANK", [], 2, "is a int, which cannot be called"),
    ("tests.user_raises:Task", [], 2, "importing tests.user_raises failed: RuntimeError: at import"),
    ("tests.user_tasks:NoValidation", ["--monitor.patience", "3"], 2, "monitor.patience: needs validation data"),
    (DIGITS, ["--task.hidden", "0"], 2, "task.hidden: 0 is too small"),
    (DIGITS, ["--optimizer.name", "torch.optim:LBFGS"], 2, "evaluates the loss several times"),
    (DIGITS, ["--optimizer.rl", "1"], 2, "optimizer.rl: unknown key 'rl'"),
    (DIGITS, ["--optimizer.lr", ".nan"], 2, "command line --optimizer.lr: optimizer.lr: nan is wrong"),
    (DIGITS, ["--data.global_batch_size", "0"], 2, "data.global_batch_size: 0 is wrong"),
    (DIGITS, ["--data.micro_batch_size", "100"], 2, "100 is more than data.global_batch_size, which is 64"),
    (DIGITS, ["--strategy.name", "naiv"], 2, "unknown name 'naiv' (did you mean 'naive'?)"),
    (DIGITS, ["--task.hiden", "3"], 2, "digits takes no 'hiden' (did you mean 'hidden'?)"),
    (DIGITS, ["--task.model", "rnn"], 2, "command line --task.model: task.model: unknown 'rnn'"),
    (DIGITS, ["--task.name", "digit"], 2, "unknown task 'digit' (did you mean 'digits'?)"),
    (DIGITS, ["--monitor.metric", "acuracy"], 2, "no metric 'acuracy' (did you mean 'accuracy'?)"),
    (DIGITS, ["--optimizer.name", "torch.optim:Admin"], 2, "has no 'Admin'"),
    (DIGITS, ["--log.observers", "[tests.user_tasks:observe]"], 2, "has no 'observe' (did you mean 'observer'?)"),
    (DIGITS, ["--world.backend", "nccl"], 3, "backend nccl needs models on GPUs"),
    (DIGITS, ["--world.device", "cuda"], 3, "sees no GPU here"),
    (DIGITS, ["--log.directory", "/proc/nowhere"], 21, "cannot be made"),
    ("tests.user_tasks:Fin", [], 2, "has no 'Fin' (did you mean 'Fine'?)"),
    ("tests.nowhere:Task", [], 2, "module 'tests.nowhere' cannot be imported"),
    ("tests.user_tasks:NoCollect", [], 2, "has no method collect(epoch)"),
    ("tests.user_tasks:NoObjectives", [], 2, "has no objectives"),
    ("tests.user_tasks:LacksALoss", [], 2, "objective 'half' of task LacksALoss lacks 'targets'"),
    ("tests.user_tasks:Raises", [], 2, "cannot be made: ValueError: the user's own reason"),
    ("tests.user_tasks:VectorLoss", [], 2, "returned a tensor of shape (20,); it must be a scalar"),
    ("tests.user_tasks:FloatLoss", [], 2, "returned a float; it must return a scalar tensor"),
    ("tests.user_tasks:DetachedLoss", [], 2, "depends on no trained parameter"),
    ("tests.user_tasks:Frozen", [], 2, "has no parameter that requires a gradient"),
    ("tests.user_tasks:Unused", [], 2, "the loss does not reach parameters spare.weight, spare.bias"),
    ("tests.user_tasks:BadMetric", [], 2, "metric 'accuracy' must be a pair (sum, count), not a float"),
    ("tests.user_tasks:Empty", [], 4, "the data set is empty"),
    ("tests.user_tasks:NoLength", [], 4, "has no length; a map-style data set is needed"),
    ("tests.user_tasks:CorruptSample", [], 4, "reading sample 7 failed: OSError: truncated image"),
    (
        str(ROOT / "configs" / "byte_lm.yaml"),
        ["--task.path", "nowhere"],
        4,
        "task.path: nowhere: there is no such file",
    ),
    ("tests.user_tasks:NaNOnTheLastRank", [], 13, "the loss became nan at step 1, learner 'model', on rank 0"),
    ("tests.user_tasks:SharedBody", [], 2, "objectives 'actor' and 'critic' share parameters"),
    ("dqn", ["--task.environment", "Pendulum-v1"], 2, "takes Box actions"),
    ("dyna", ["--task.environment", "CartPol-v1"], 2, "CartPol"),
    ("gan", ["--learners.generater.optimizer.lr", "1"], 2, "has no learner 'generater' (did you mean 'generator'?)"),
    ("gan", ["--learners.generator.optimizer.rl", "1"], 2, "learners.generator: optimizer.rl: unknown key 'rl'"),
    ("gan", ["--learners.generator.data.workers", "1"], 2, "a learner has no section 'data'"),
    ("gan", ["--learners.generator.optimizer.name", "nodam"], 2, "unknown name 'nodam'"),
    (DIGITS, ["--task.loss", "focl"], 2, "task.loss: unknown 'focl' (did you mean 'focal'?)"),
    (DIGITS, ["--task.loss", "focal", "--task.loss_options", "{gama: 2}"], 2, "focal takes no 'gama'"),
    (DIGITS, ["--task.loss", "nll_loss"], 2, "command line --task.loss: task.loss: unknown 'nll_loss'"),
    (DIGITS, ["--task.loss", "focal", "--task.loss_options", "gamma"], 2, "must be a mapping, such as {gamma: 3}"),
    ("tests.user_tasks:NothingCollected", [], 4, "no rank collected anything"),
]


@pytest.mark.parametrize(("target", "settings", "code", "message"), MISTAKES, ids=[m[3][:50] for m in MISTAKES])
def test_a_mistake_is_one_sentence_and_an_exit_code(
    tmp_path: Path, target: str, settings: list[str], code: int, message: str
) -> None:
    codes, _, err = train(tmp_path, target, *settings)
    assert codes == [code], err
    assert len(sentences(err)) == 1 and message in sentences(err)[0], err


IN_COMPANY = [
    ("tests.user_tasks:ValidationOnOneRank", "naive", {12}, "number of validation samples is 20 on rank 0 and 0"),
    ("tests.user_tasks:Fin", "ddp", {2}, "has no 'Fin'"),
    ("tests.user_tasks:VectorLoss", "ddp", {2}, "it must be a scalar"),
    ("tests.user_tasks:Unused", "ddp", {2}, "the loss does not reach parameters spare.weight"),
    ("tests.user_tasks:Unused", "naive", {2}, "the loss does not reach parameters spare.weight"),
    ("tests.user_tasks:UnusedOnOneRank", "ddp", {2}, "the loss does not reach parameters spare.weight"),
    ("tests.user_tasks:UnusedOnOneRank", "naive", {0}, ""),
    ("tests.user_tasks:OtherModelOnOneRank", "ddp", {12}, "model differs from rank 0's at parameter 0"),
    ("tests.user_tasks:DetachedOnTheLastRank", "naive", {2}, "depends on no trained parameter"),
    (
        "tests.user_tasks:UnusedLast",
        "ddp --data.micro_batch_size 5",
        {2},
        "the loss does not reach parameters spare.weight",
    ),
    ("tests.user_tasks:UnusedLater", "ddp", {2}, "did not reach every parameter"),
    ("tests.user_tasks:OtherLength", "naive", {12}, "number of samples is 20 on rank 0 and 21 on rank 1"),
    ("tests.user_tasks:CorruptSample", "naive", {4}, "reading sample 7 failed"),
    ("tests.user_tasks:NaNOnTheLastRank", "ddp", {13}, "learner 'model', on rank 1"),
    ("tests.user_tasks:SharedBody", "ddp", {2}, "objectives 'actor' and 'critic' share parameters"),
    ("tests.user_tasks:NothingCollected", "naive", {4}, "no rank collected anything"),
    (
        "tests.user_tasks:PerRankOnOneRank",
        "naive",
        {12},
        "ranks collect differently: collect(0) returned a data set on rank 0",
    ),
    ("tests.user_tasks:KilledRank", "ddp", {10, -9}, "another rank has ended"),
    ("tests.user_tasks:KilledRank", "naive", {10, -9}, "rank 1 of this host has ended"),
]


@pytest.mark.parametrize(("target", "strategy", "expected", "message"), IN_COMPANY)
def test_in_company_one_rank_speaks_and_all_end_soon(
    tmp_path: Path, target: str, strategy: str, expected: set[int], message: str
) -> None:
    begun = time.monotonic()
    settings = ("--strategy.name", *strategy.split(), "--log.picture", "false")
    codes, _, err = train(tmp_path, target, *settings, ranks=2)
    assert set(codes) == expected, err
    assert len(sentences(err)) == bool(message)
    assert message in err
    assert time.monotonic() - begun < 30, "not a timing: a hang would last for the timeout of five minutes"


@pytest.mark.parametrize("lines", [0, 12])
def test_a_reader_that_leaves_does_not_end_the_training(tmp_path: Path, lines: int) -> None:
    command = [sys.executable, "-m", "distloop", "train", DIGITS, *SHORT, "--log.name", "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0, errors
    assert (tmp_path / "runs" / "run" / "model.safetensors").exists()


def test_a_bug_of_the_users_shows_its_traceback_once(tmp_path: Path) -> None:
    codes, _, err = train(tmp_path, "tests.user_tasks:BugOnOneRank", ranks=2)
    assert codes == [1, 1]
    assert err.count("Traceback") == 1
    assert 'KeyError: "the user\'s own bug"' in err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 (set by torchrun) is outside the world"),
        ({"WORLD_SIZE": "4"}, "RANK is missing"),
        ({"RANK": "0", "WORLD_SIZE": "x"}, "WORLD_SIZE='x' is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT is not set"),
    ],
)
def test_a_wrong_environment_is_one_sentence(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    codes, _, err = train(tmp_path, DIGITS, **variables)
    assert codes == [3]
    assert len(sentences(err)) == 1 and message in err


def test_a_rank_that_never_comes_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from tests.ranks import free_port

    variables["MASTER_PORT"] = str(free_port())
    codes, _, err = train(tmp_path, DIGITS, "--world.timeout", "2", **variables)
    assert codes == [3], err
    assert sentences(err) == ["distloop: " + ONE_MISSING], err


def test_traceback_on_demand(tmp_path: Path) -> None:
    _, _, err = train(tmp_path, "missing.yaml", "--traceback")
    assert "Traceback" in err and "distloop: missing.yaml: there is no such file" in err


def test_config_shows_where_every_value_comes_from(tmp_path: Path) -> None:
    arguments = ("config", DIGITS, "--optimizer.lr", "0.5", "--json")
    (end,) = run_command(*arguments, folder=tmp_path, DISTLOOP_TRAIN__SEED="7")
    rows = {row["key"]: row for row in json.loads(end.out)}
    assert rows["optimizer.lr"] == {"key": "optimizer.lr", "value": 0.5, "source": "command line --optimizer.lr"}
    assert rows["train.seed"]["source"] == "environment DISTLOOP_TRAIN__SEED"
    assert rows["data.global_batch_size"]["source"].startswith(DIGITS + ":")
    assert rows["world.timeout"]["source"] == "default"
    (end,) = run_command("config", DIGITS, folder=tmp_path)
    assert end.code == 0 and "optimizer.weight_decay" in end.out
    (end,) = run_command("config", DIGITS, "--strategy.name", "rign", folder=tmp_path)
    assert end.code == 2 and "strategy.name: unknown name 'rign'" in end.err


def test_a_task_of_ones_own_with_options_and_an_observer(tmp_path: Path) -> None:
    settings = ("--task.size", "3", "--log.observers", "[tests.user_tasks:observer]", "--train.max_steps", "2")
    codes, out, err = train(tmp_path, "tests.user_tasks:Fine", *settings)
    assert codes == [0], err
    assert "model with 15 parameters" in out
    assert "user observer: end" in out
