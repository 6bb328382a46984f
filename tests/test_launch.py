"""What starts runs: rendered commands and files, the scripts in launch/ for real, those in slurm/ with a small fake."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distloop import launch_cli
from distloop.launching import commands, requeue
from distloop.launching.commands import Box, Wanted
from distloop.targets import given
from tests.ranks import MPICH, OPEN_MPI, ROOT, Mpi, run_command

ODD = "run dir/ü $(id)"
SETTINGS = ("digits", "--log.name", ODD)
QUIET = ("--log.tensorboard", "false", "--log.picture", "false", "--log.progress", "false")
SHORT = ("--train.epochs", "1", "--world.device", "cpu", *QUIET)
TRAIN = ["-m", "distloop", "train", *SETTINGS]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (commands.local(Wanted(SETTINGS, "py")), ["py", *TRAIN]),
        (
            commands.torchrun(Wanted(SETTINGS, "py", 1, 4)),
            [*shlex.split("py -m distloop.agent --nnodes 1 --nproc-per-node 4 --standalone"), *TRAIN],
        ),
        (
            commands.torchrun(Wanted(SETTINGS, "py", 2, 4, "[fd00::1]:29500"), 1),
            [
                *shlex.split("py -m distloop.agent --nnodes 2 --nproc-per-node 4 --node-rank 1"),
                *shlex.split("--master-addr fd00::1 --master-port 29500"),
                *TRAIN,
            ],
        ),
        (
            commands.mpirun(Wanted(SETTINGS, "py", 2, 4)),
            [
                *shlex.split("mpirun -n 8 --mca odls_base_sigkill_timeout 5 --map-by ppr:4:node:OVERSUBSCRIBE py"),
                *TRAIN,
            ],
        ),
        (
            commands.mpirun(Wanted(SETTINGS, "py", 2, 4), mpich=True),
            ["mpirun", "-n", "8", "-ppn", "4", "py", *TRAIN],
        ),
        (
            commands.docker(
                Wanted(("c/ü, d.yaml", "--log.directory=x", "--log.directory", "y", "--log.name", ODD), ranks=2),
                Box(Path("/w d"), Path("/r s"), "1:2", Path("/c/ü, d.yaml"), gpus=True, variables=("DISTLOOP_A__B",)),
            ),
            [
                *shlex.split("docker run --rm --gpus all --shm-size 16g --ulimit memlock=-1 --read-only --tmpfs /tmp"),
                *("--user", "1:2", "--mount", "type=bind,src=/w d,dst=/work"),
                *("--mount", 'type=bind,"src=/c/ü, d.yaml","dst=/config/ü, d.yaml",readonly'),
                *("--mount", "type=bind,src=/r s,dst=/runs"),
                *shlex.split("--env PET_NPROC_PER_NODE=2 --env DISTLOOP_A__B distloop:cuda train"),
                *("/config/ü, d.yaml", "--log.name", ODD, "--log.directory", "/runs"),
            ],
        ),
        (
            commands.docker(
                Wanted(("c/d.yaml", "--resume", "../r/n", "--traceback"), ranks=1),
                Box(Path("/w"), Path("/w/r"), "0:0", Path("/w/c/d.yaml"), Path("/w/r/n"), image="mine:1"),
            ),
            [
                *shlex.split("docker run --rm --shm-size 1g --read-only --tmpfs /tmp --user 0:0"),
                *shlex.split("--mount type=bind,src=/w,dst=/work --env PET_NPROC_PER_NODE=1 mine:1 train"),
                *shlex.split("/work/c/d.yaml --log.directory /work/r --resume /work/r/n --traceback"),
            ],
        ),
    ],
)
def test_commands_are_lists_that_can_be_pasted(command: list[str], expected: list[str]) -> None:
    assert command == expected
    echoed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {commands.shown(command)}"], capture_output=True, text=True, check=True
    )
    assert echoed.stdout.split("\0")[:-1] == expected


@pytest.mark.parametrize("agents", [False, True])
def test_a_script_for_slurm_is_the_supplied_one_with_other_values(agents: bool) -> None:
    name = "torchrun.sbatch" if agents else "train.sbatch"
    supplied = (ROOT / "slurm" / name).read_text()
    assert (ROOT / "distloop" / "launching" / name).read_text() == supplied
    wanted = Wanted(SETTINGS, nodes=3, ranks=5)
    script = commands.slurm(wanted, agents=agents, time="2-00", folder="/a b/bin")
    changed = [line for line in script.splitlines() if line not in supplied.splitlines()]
    own = ["RANKS=5"] if agents else []
    options = ["#SBATCH --nodes=3", *([] if agents else ["#SBATCH --ntasks-per-node=5"]), "#SBATCH --time=2-00"]
    assert changed == [*options, "export PATH='/a b/bin':$PATH", *own, f"set -- digits --log.name {shlex.quote(ODD)}"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def said(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    ended = run_command("launch", *arguments, folder=folder, **variables)[0]
    return ended.code, ended.out, ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--via", "torchrun", "digitz"), 2, "'digitz' is neither a file nor a supplied task"),
        (("--via", "mpirun", "digits", "--optimizer.lr", "fast"), 2, "command line --optimizer.lr"),
        (("--via", "local", "--ranks-per-node", "2", "digits"), 2, "--via local: is one process"),
        (("--via", "torchrun", "--nodes", "2", "digits"), 2, "--master: ADDRESS:PORT"),
        (("--via", "torchrun", "--nodes", "2", "--master", "a:1", "digits"), 2, "--node-rank: is missing"),
        (("--via", "docker", "--nodes", "2", "digits"), 2, "--via docker: is one host"),
        (("--via", "docker", "--resume", "r"), 2, "command line --resume: r: is no run directory"),
        (("--via", "docker", "digits", "--resume", "/nowhere"), 2, "--resume: /nowhere: the container sees"),
        (("--via", "slurm", "digits", "--simulate", "x"), 2, "Invalid value for '--simulate': 'x'"),
        (
            ("--via", "torchrun", "--ranks-per-node", "2", "digits", "--simulate", "2"),
            2,
            "command line --simulate: 2 r",
        ),
        (("--via", "docker", "digits"), 3, "--via docker: docker is not to be found on this machine"),
        (("--via", "slurm", "digits"), 3, "--via slurm: sbatch is not to be found on this machine"),
        (("--via", "mpirun", "digits"), 3, "--via mpirun: mpirun is not to be found on this machine"),
    ],
)
def test_what_cannot_be_started_is_a_sentence(
    tmp_path: Path, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    found = said(tmp_path, *arguments, PATH=str(tmp_path))
    assert (found[0], found[1]) == (code, "")
    assert found[2].startswith("distloop: ") and found[2].count("\n") == 1, found[2]
    assert sentence in found[2]


def test_each_host_has_its_line(tmp_path: Path) -> None:
    many = ("--via", "torchrun", "--nodes", "2", "--ranks-per-node", "3", "--master", "h:1", "--print", *SETTINGS)
    code, out, err = said(tmp_path, *many)
    assert (code, err) == (0, "")
    wanted = Wanted(SETTINGS, sys.executable, 2, 3, "h:1")
    assert [shlex.split(line) for line in out.splitlines()] == [commands.torchrun(wanted, node) for node in (0, 1)]


@pytest.mark.parametrize("own", [("--resume", "auto"), ("--resume=auto", "--traceback"), ("--simulate", "3")])
def test_train_gets_its_own_words(tmp_path: Path, own: tuple[str, ...]) -> None:
    code, out, err = said(tmp_path, "--via", "local", "--print", *SETTINGS, *own)
    assert (code, err) == (0, "")
    assert sorted(shlex.split(out)) == sorted([sys.executable, *TRAIN, *own])


@pytest.mark.parametrize(("device", "gpus"), [("cpu", False), ("cuda", True), ("auto", True), ("auto", False)])
def test_the_image_is_that_for_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, gpus: bool
) -> None:
    driver = 'echo "0, NVIDIA H100, 81559 MiB, 550.1, 9.0"' if device != "auto" or gpus else "exit 9"
    fake(tmp_path, "nvidia-smi", driver)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("DISTLOOP_TRAIN__SEED", "5")
    resolved = given(words := (*SETTINGS, "--world.device", device)).resolved()
    box = launch_cli._box(Wanted(words), resolved, None, make_runs=False)
    assert box == Box(tmp_path, tmp_path / "runs", f"{os.getuid()}:{os.getgid()}", None, None, box.gpus, box.variables)
    assert box.gpus == gpus or (device == "auto" and Path("/dev/nvidia0").exists())
    assert "DISTLOOP_TRAIN__SEED" in box.variables
    command = commands.docker(Wanted(words), box)
    assert command[command.index("train") - 1] == ("distloop:cuda" if box.gpus else "distloop:cpu")
    assert ("--gpus" in command) == box.gpus


# -- whose mpirun, and a job of it ------------------------------------------------------------------------------------

BUGS = "Report bugs to http"
OPEN_MPI_4 = f"mpirun (Open MPI) 4.1.6\n\n{BUGS}://www.open-mpi.org/community/help/"
OPEN_MPI_5 = f"mpirun (Open MPI) 5.0.11\n\n{BUGS}s://www.open-mpi.org/community/help/"
HYDRA = """HYDRA build details:
    Version:                                 4.2.3
    Release Date:                            Wed Oct  2 09:11:32 AM CDT 2024
    CC:                              icx
    Configure options:                       '--prefix=/opt/Open MPI/../mpich' '--with-prrte=no' 'CC=icx' # Intel
    Process Manager:                         pmi
    Launchers available:                     ssh rsh fork slurm ll lsf sge manual persist"""
INTEL = """Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005 (id: 74c4a23)
Copyright 2003-2023, Intel Corporation."""


@pytest.mark.parametrize(
    ("says", "family"),
    [
        (OPEN_MPI_4, "Open MPI"),
        (OPEN_MPI_5, "Open MPI"),
        (OPEN_MPI_4.replace("4.1.6", "4.1.6 built by Intel oneAPI"), "Open MPI"),
        ("mpirun (PRRTE) 3.0.6", "Open MPI"),
        (HYDRA, "MPICH"),
        (INTEL, "MPICH"),
        ("something else", None),
    ],
)
def test_all_agree_whose_mpirun_it_is(tmp_path: Path, says: str, family: str | None) -> None:
    fake(tmp_path, "mpirun", f'[ "$1" = --version ] && echo {shlex.quote(says)} || printf \'%s\\0\' "$@"')
    with script("mpirun.sh", tmp_path, "digits", MPIRUN=str(tmp_path / "mpirun")) as process:
        out, err = process.communicate(timeout=20)
    path = f"{tmp_path}:{os.environ['PATH']}"
    code, launched, error = said(tmp_path, "--via", "mpirun", "digits", PATH=path)
    if family is None:
        assert (process.returncode, code, out, launched) == (3, 3, "", "")
        assert "neither Open MPI's nor MPICH's: something else" in err
        assert "neither Open MPI's nor MPICH's: something else" in error
        return
    assert (process.returncode, err, code, error) == (0, "", 0, "")
    for words in (out, launched):
        assert ("odls_base_sigkill_timeout" in words.split("\0")) == (family == "Open MPI")


JOB = f"""
[ "$1" = --version ] && {{ echo {shlex.quote(OPEN_MPI_5)}; exit; }}
trap 'echo asked >> "$FAKE/asked"; sleep 1; [ "$ENDS" = no ] || exit 75' USR1
trap 'exit 41' TERM
touch "$FAKE/ready"
while true; do sleep 0.05; done
"""


def start_job(folder: Path, by: str, ends: str) -> subprocess.Popen[str]:
    fake(folder, "mpirun", JOB)
    variables = {"FAKE": str(folder), "ENDS": ends, "MPIRUN": str(folder / "mpirun")}
    if by == "script":
        process = script("mpirun.sh", folder, "digits", **variables)
    else:
        path = f"{folder}:{os.environ['PATH']}"
        process = subprocess.Popen(
            [sys.executable, "-m", "distloop", "launch", "--via", "mpirun", "digits"],
            cwd=folder,
            env=environment(**variables) | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    deadline = time.monotonic() + 60
    while not (folder / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    time.sleep(0.1)
    return process


@pytest.mark.parametrize("by", ["script", "launch"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_ranks_of_mpirun_may_save(tmp_path: Path, by: str, number: signal.Signals) -> None:
    with start_job(tmp_path, by, "yes") as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (75, "", "")
    assert (tmp_path / "asked").read_text() == "asked\n"


@pytest.mark.parametrize("by", ["script", "launch"])
def test_the_second_order_ends_mpirun(tmp_path: Path, by: str) -> None:
    with start_job(tmp_path, by, "no") as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(2.2)  # the script counts whole seconds
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (41, "", "")


# -- the scripts of launch/, for real ----------------------------------------------------------------------------------


def environment(*, mpi: Mpi | None = None, **variables: str) -> dict[str, str]:
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    own = {} if mpi is None else {"MPIRUN": mpi.command[0]} | dict(mpi.variables)
    given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ":".join(folders), "RANKS": "2"}
    return os.environ | given | own | variables


def script(name: str, folder: Path, *arguments: str, **variables: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(ROOT / "launch" / name), *arguments],
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "mpi"),
    [("local.sh", 1, None), ("torchrun.sh", 2, None), ("mpirun.sh", 2, OPEN_MPI), ("mpirun.sh", 2, MPICH)],
)
def test_scripts_train_and_save_when_they_are_ended(tmp_path: Path, name: str, ranks: int, mpi: Mpi | None) -> None:
    if mpi is not None and (why := mpi.missing()) is not None:
        pytest.skip(why)
    folder = tmp_path / ODD
    folder.mkdir(parents=True)
    long = ("--train.epochs", "1000", "--world.device", "cpu", *QUIET, "--log.every", "1")
    with script(name, folder, "digits", "--log.name", "ü $(id)", *long, mpi=mpi) as process:
        metrics = folder / "runs" / "ü $(id)" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and '"train"' in metrics.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=40)
    assert process.returncode == 75, (out, err)
    assert "Traceback" not in err
    result = json.loads((metrics.parent / "result.json").read_text())
    attempt = json.loads((metrics.parent / "run.json").read_text())["attempts"][0]
    assert (result["exit_code"], attempt["ranks"]) == (75, ranks)
    assert list((metrics.parent / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("name", "variables", "code", "sentence"),
    [
        ("torchrun.sh", {"HOSTS": "2"}, 2, "MASTER=ADDRESS:PORT is missing"),
        ("mpirun.sh", {"MPIRUN": "/no/mpirun"}, 3, "/no/mpirun cannot be run: install an MPI"),
        ("mpirun.sh", {"MPIRUN": "/bin/cat"}, 3, "/bin/cat is neither Open MPI's nor MPICH's"),
    ],
)
def test_scripts_say_what_is_missing(
    tmp_path: Path, name: str, variables: dict[str, str], code: int, sentence: str
) -> None:
    with script(name, tmp_path, "digits", **variables) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err.count("\n")) == (code, "", 1)
    assert sentence in err


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "--nnodes 1 --nproc-per-node 2 --max-restarts 0 --standalone"),
        (
            {"HOSTS": "2", "HOST": "1", "MASTER": "fd::1:29500", "RESTARTS": "3", "ADDRESS": "x"},
            "--nnodes 2 --nproc-per-node 2 --max-restarts 3 --node-rank 1 --master-addr fd::1 --master-port 29500 "
            "--rdzv-id distloop --local-addr x",
        ),
        (
            {"HOSTS": "1:4", "MASTER": "a:1", "JOB": "7"},
            "--nnodes 1:4 --nproc-per-node 2 --max-restarts 0 --rdzv-backend c10d --rdzv-endpoint a:1 --rdzv-id 7",
        ),
    ],
)
def test_torchrun_sh_passes_on_what_it_is_told(tmp_path: Path, variables: dict[str, str], expected: str) -> None:
    fake(tmp_path, "python", 'printf "%s\\0" "$@"')
    with script("torchrun.sh", tmp_path, *SETTINGS, PYTHON=str(tmp_path / "python"), **variables) as process:
        out = process.communicate(timeout=20)[0]
    assert out.split("\0")[:-1] == ["-m", "distloop.agent", *expected.split(), *TRAIN]


# -- the files of slurm/, with a fake of its commands ------------------------------------------------------------------

SRUN = """
while [ "${1#--}" != "$1" ]; do echo "$1" >> "$FAKE/srun"; shift; done
echo "$MASTER_ADDR $OMP_NUM_THREADS $DISTLOOP_LOG__NAME" >> "$FAKE/environment"
printf '%s\\0' "$@" > "$FAKE/command"
exit "$CODE"
"""
SCONTROL = """
case $1 in
    show) [ "$2" = hostnames ] && printf 'no-such-node\\nb\\n' || echo "NodeName=a NodeAddr=127.0.0.9 Port=1" ;;
    requeue) echo "$2" >> "$FAKE/requeued" ;;
esac
"""


def fake(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def under_fake_slurm(folder: Path, name: str, *arguments: str, code: int, **variables: str) -> list[str]:
    """Run a batch script; return the command it gave srun."""
    where = folder / "fake"
    where.mkdir(exist_ok=True)
    fake(where, "srun", SRUN)
    fake(where, "scontrol", SCONTROL)
    given = {
        "FAKE": str(where),
        "CODE": str(code),
        "SLURM_JOB_NAME": "ü job",
        "SLURM_JOB_ID": "12",
        "SLURM_NNODES": "2",
    }
    path = f"{where}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", str(ROOT / "slurm" / name), *arguments],
        cwd=folder,
        env=environment() | given | {"PATH": path, "SLURM_JOB_NODELIST": "n[1-2]"} | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    (folder / "err").write_text(ended.stderr)
    return (where / "command").read_text().split("\0")[:-1]


def requeued(folder: Path) -> bool:
    return (folder / "fake" / "requeued").exists()


@pytest.mark.parametrize("name", ["train.sbatch", "torchrun.sbatch"])
def test_a_batch_script_starts_ranks(tmp_path: Path, name: str) -> None:
    settings = ("digits", "--train.seed", "{task}", "--task.note", ODD)
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "4", "RANKS": "2"}
    command = under_fake_slurm(tmp_path, name, *settings, code=13, **array)
    expected = ["digits", "--train.seed", "3", "--task.note", ODD]
    assert command[-9:] == ["-m", "distloop", "train", "--resume", "auto", *expected][-9:]
    seen = (tmp_path / "fake" / "environment").read_text().strip()
    options = (tmp_path / "fake" / "srun").read_text().splitlines()
    assert {"--kill-on-bad-exit=1", "--open-mode=append"} <= set(options)
    if name == "train.sbatch":
        assert seen == "127.0.0.9 4 ü job-9-3"
        assert "--output=slurm-logs/ü job-9-3/rank-%t.log" in options
    else:
        assert seen == "2 ü job-9-3"  # torchrun tells the ranks the address
        assert command[command.index("--master-addr") + 1] == "127.0.0.9"
        assert command[command.index("--nproc-per-node") + 1] == "2"
    assert not requeued(tmp_path), "a NaN would be there again"


def attempts(folder: Path, *began: int | None, newest: int) -> None:
    run = folder / "runs" / "ü job-12"
    (run / "checkpoints" / f"step-{newest:08}").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"attempts": [{"resumed_step": step} for step in began]}))


@pytest.mark.parametrize(
    ("began", "newest", "restarts", "again"),
    [((None,), 5, "", True), ((None, 5), 5, "1", True), ((None, 5, 5), 5, "2", False), ((5, 5), 5, "", True)],
)
def test_a_job_that_gets_no_further_is_not_started_for_ever(
    tmp_path: Path, began: tuple[int | None, ...], newest: int, restarts: str, again: bool
) -> None:
    attempts(tmp_path, *began, newest=newest)
    variables = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    under_fake_slurm(tmp_path, "train.sbatch", "digits", code=75, **variables)
    assert requeued(tmp_path) == again
    assert ("stopped at step 5 twice without getting further" in (tmp_path / "err").read_text()) != again


def test_a_job_that_goes_on_from_a_checkpoint_is_requeued(tmp_path: Path) -> None:
    attempts(tmp_path, None, 5, newest=9)
    (tmp_path / "runs" / "ü job-12").rename(tmp_path / "old run")
    (tmp_path / "old run" / "config.yaml").write_text("task: {name: digits}\n")
    chosen = ("--resume", "old run/checkpoints/step-00000005", "--traceback")
    command = under_fake_slurm(tmp_path, "train.sbatch", *chosen, code=75)
    assert command[-3:] == list(chosen)
    assert requeued(tmp_path), (tmp_path / "err").read_text()
    (tmp_path / "fake" / "requeued").unlink()
    command = under_fake_slurm(tmp_path, "train.sbatch", "digits", *chosen, code=75, SLURM_RESTART_COUNT="1")
    assert command[-4:] == ["digits", "--resume", "old run", "--traceback"], "or it would not get further"
    assert requeued(tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("digits", "--log.name", "a"), "runs/a"),
        (("digits", "--log.name", "a", "--simulate", "2", "--traceback", "--resume=auto"), "runs/a"),
        (("digits", "--log.name", "a", "--resume", "x/y"), "x/y"),
        (("digits", "--resume", "x/y/checkpoints/step-00000003"), "x/y"),
    ],
)
def test_which_run_goes_on_is_known(words: tuple[str, ...], expected: str) -> None:
    assert requeue.run_of(words) == Path(expected)


@pytest.mark.parametrize(
    ("began", "newest", "restarts", "expected"),
    [
        ([], 0, 0, False),
        ([None], 0, 0, False),
        ([None, None], 0, 1, True),
        ([None, 4], 4, 1, False),
        ([4, 4], 4, 1, True),
        ([4, 4], 6, 1, False),
        ([4, 4], 4, 0, False),
    ],
)
def test_progress_is_told_from_a_loop(began: list[int | None], newest: int, restarts: int, expected: bool) -> None:
    assert requeue.stuck(began, newest, restarts) == expected
