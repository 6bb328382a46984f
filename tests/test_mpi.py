"""MPI, for real: ranks that mpirun started. Importing torch costs each of them seconds, so a job does many checks."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distloop.errors import RankHungError
from distloop.transports import Transport
from distloop.transports.base import CONTROL_TAG
from tests.parity import Case, run_cases
from tests.ranks import MPICH, OPEN_MPI, Ended, Mpi, mpirun, run_command, under_mpirun
from tests.test_exactness import assert_parity, grid, in_single_precision
from tests.test_transports import contract

DIGITS = str(Path(__file__).parent.parent / "configs" / "digits.yaml")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
QUIET = ("--log.tensorboard", "false", "--log.picture", "false", "--log.progress", "false")


@pytest.fixture(params=[pytest.param(mpi, marks=pytest.mark.slow, id=mpi.name) for mpi in (OPEN_MPI, MPICH)])
def mpi(request: pytest.FixtureRequest) -> Mpi:
    if (reason := request.param.missing()) is not None:
        pytest.skip(reason)
    return request.param


def checks(transport: Transport, cases: list[Case]) -> Any:
    """Return what cannot be judged here."""
    contract(transport)
    for dtype in DTYPES:
        any_dtype_arrives_whole(transport, dtype)
    broadcast_keeps_the_layout(transport)
    control_messages_and_gradients_do_not_mix(transport)
    the_library_sums(transport)
    a_message_of_another_size_is_refused(transport)
    silence_names_the_rank(transport)
    works_may_be_dropped(transport)
    torch_is_there_too(transport)
    return list(transport.hosts), transport.overlaps, run_cases(transport, cases)


def any_dtype_arrives_whole(transport: Transport, dtype: torch.dtype) -> None:
    behind, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    for shape in ((), (0,), (3, 5), (70_000,)):
        sent = (torch.arange(float(torch.Size(shape).numel())) + 1 + transport.rank).reshape(shape).to(dtype)
        expected = (torch.arange(float(torch.Size(shape).numel())) + 1 + before).reshape(shape).to(dtype)
        got = torch.zeros(shape, dtype=dtype)
        works = [transport.irecv(got, before), transport.isend(sent, behind)]
        for work in works:
            work.wait()
        assert torch.equal(got, expected), (dtype, shape)


def broadcast_keeps_the_layout(transport: Transport) -> None:
    for root in range(transport.size):
        rows = torch.arange(12.0).view(3, 4) * (transport.rank + 1)
        tensors = {
            "transposed": (rows.clone().t(), rows.t()),
            "strided": (rows.clone()[:, ::2], rows[:, ::2]),
            "0-dim": (rows.clone()[1, 1], rows[1, 1]),
            "bf16": (rows.bfloat16(), rows.bfloat16()),
            "channels last": (rows.view(1, 3, 2, 2).to(memory_format=torch.channels_last), rows.view(1, 3, 2, 2)),
        }
        for name, (tensor, own) in tensors.items():
            transport.broadcast(tensor, root)
            assert torch.equal(tensor, own / (transport.rank + 1) * (root + 1)), (name, root)
    base = torch.arange(9.0) * (transport.rank == 0)
    transport.broadcast(base[::3])
    assert base[::3].tolist() == [0, 3, 6] and base[1::3].sum() == 12 * (transport.rank == 0), "only what was sent"
    weight = torch.ones(2, requires_grad=True)
    transport.broadcast(weight)


def control_messages_and_gradients_do_not_mix(transport: Transport) -> None:
    behind, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    sent = [transport.isend(torch.tensor([1.0]), behind), transport.isend(torch.tensor([2.0]), behind, CONTROL_TAG)]
    control, gradient = torch.zeros(1), torch.zeros(1)
    transport.recv(control, before, CONTROL_TAG)
    transport.recv(gradient, before)
    for work in sent:
        work.wait()
    assert (float(gradient), float(control)) == (1.0, 2.0)
    gathered = transport.all_gather(changing := torch.tensor([float(transport.rank)]))
    changing.fill_(-1)
    assert gathered.wait().flatten().tolist() == list(range(transport.size)), "as it was when it was given"


def the_library_sums(transport: Transport) -> None:
    assert transport.library is not None
    for dtype in (torch.float32, torch.float64):
        for n in (1, 1000):
            tensor = torch.arange(n, dtype=dtype) * (transport.rank + 1)
            transport.library(tensor)
            assert torch.equal(tensor, torch.arange(n, dtype=dtype) * transport.size * (transport.size + 1) / 2)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="float32 and float64 here, not"):
            transport.library(torch.ones(8, dtype=dtype))


def a_message_of_another_size_is_refused(transport: Transport) -> None:
    behind, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    for expected in (2, 4):
        sent = transport.isend(torch.zeros(3), behind)
        with pytest.raises(RuntimeError, match=f"expected {4 * expected} bytes from rank {before}"):
            transport.recv(torch.zeros(expected), before)
        sent.wait()


def silence_names_the_rank(transport: Any) -> None:
    usual, transport.timeout = transport.timeout, 0.2
    last = transport.size - 1
    if transport.rank != last:
        with pytest.raises(RankHungError, match=f"rank {transport.rank} heard nothing from rank {last} for 0.2 s"):
            transport.recv(torch.zeros(1), last)
    transport.timeout = usual
    if transport.rank == last:
        for peer in transport.peers():
            transport.recv(torch.zeros(1), peer, CONTROL_TAG)
            transport.send(torch.ones(1), peer)
    else:
        transport.send(torch.zeros(1), last, CONTROL_TAG)
        (late,) = transport.under_way  # nobody holds it any more, but MPI, which still writes into its buffer
        late.wait()
        assert late._buffer.tolist() == [1.0]


def works_may_be_dropped(transport: Any) -> None:
    behind, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    transport.irecv(torch.zeros(100_000), before)
    transport.isend(torch.ones(100_000), behind)
    received, sent = sorted(transport.under_way, key=lambda work: work._sends)
    sent.wait()
    received.wait()
    assert received._buffer.sum() == 100_000 and not transport.under_way


def torch_is_there_too(transport: Transport) -> None:
    group = transport.process_group()
    assert group is transport.process_group(), "formed once"
    tensor = torch.ones(3)
    torch.distributed.all_reduce(tensor, group=group)
    assert tensor.tolist() == [transport.size] * 3
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo"), "ranks of one host do not listen to others"


@pytest.mark.parametrize("size", [3])  # two ranks train below; docs/parity.py has both
def test_contract_and_parity(size: int, mpi: Mpi) -> None:
    cases = [
        case for name in ("naive", "ddp", "zero_offload") for case in grid(name, size)[size % 3 :: 3]
    ]  # all are in docs/parity.py
    cases += in_single_precision(cases[::6])
    results = under_mpirun(size, checks, cases, mpi=mpi)
    assert [hosts for hosts, _, _ in results] == [[0] * size] * size
    assert all(overlaps for _, overlaps, _ in results), "these MPIs have MPI_THREAD_MULTIPLE"
    assert_parity(size, cases, [outcomes for _, _, outcomes in results])


def test_training_says_what_one_process_says(mpi: Mpi, tmp_path: Path) -> None:
    short = ("train", DIGITS, "--train.max_steps", "8", *QUIET, "--log.every", "1", "--strategy.name", "naive")
    (alone,) = run_command(*short, "--log.name", "one", folder=tmp_path)
    job = mpirun(2, "-m", "distloop", *short, "--log.name", "two", folder=tmp_path, mpi=mpi)
    assert (alone.code, job.code) == (0, 0), alone.err + job.err
    assert f"2 ranks started by {mpi.name}" in job.out and job.out.count("kept model") == 1
    assert job.err == ""
    one, two = (losses(tmp_path / "runs" / name) for name in ("one", "two"))
    assert len(one) == 9 and two == pytest.approx(one, rel=1e-5), "eight steps and an evaluation"


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] in ("train", "evaluate")]


def said(job: Ended) -> list[str]:
    return [line.strip() for line in job.err.splitlines() if line.startswith("distloop: ")]


@pytest.mark.alone
@pytest.mark.parametrize(
    ("task", "size", "code", "sentence"),
    [
        ("SilentRank", 3, 11, "heard nothing from rank 1 for 2 s"),
        ("OtherModelOnOneRank", 2, 12, "rank 1's model differs from rank 0's"),
    ],
)
def test_a_failure_is_one_sentence_and_its_code(
    task: str, size: int, code: int, sentence: str, mpi: Mpi, tmp_path: Path
) -> None:
    train = ("train", f"tests.user_tasks:{task}", "--world.timeout", "2", "--strategy.name", "naive")
    job = mpirun(size, "-m", "distloop", *train, *QUIET, folder=tmp_path, mpi=mpi, seconds=40)
    assert job.code == code, job.err
    (line,) = said(job)
    assert sentence in line and "Traceback" not in job.err


def test_a_killed_rank_ends_the_job(mpi: Mpi, tmp_path: Path) -> None:
    train = ("train", "tests.user_tasks:KilledRank", "--strategy.name", "naive")
    begun = time.monotonic()
    job = mpirun(2, "-m", "distloop", *train, *QUIET, folder=tmp_path, mpi=mpi, seconds=60)
    assert job.code in (137, 9), "128 + SIGKILL, or SIGKILL as MPICH has it"
    assert time.monotonic() - begun < 50, "the timeout is 300 s: mpirun has ended the others"
    assert len(said(job)) <= 1 and "Traceback" not in job.err


def test_a_mistake_that_all_make_is_said_once(mpi: Mpi, tmp_path: Path) -> None:
    job = mpirun(2, "-m", "distloop", "train", DIGITS, "--lr", "1", folder=tmp_path, mpi=mpi, seconds=40)
    assert job.code == 2
    (line,) = said(job)
    assert "did you mean optimizer.lr?" in line


SCRIPT = """
import torch, distloop
from torch import nn
from torch.utils.data import TensorDataset
from tests.user_tasks import RANK

data = TensorDataset(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2)
for strategy in ("ddp", "naive"):
    torch.manual_seed(0)
    task = distloop.Supervised(nn.Linear(4, 2), nn.CrossEntropyLoss(), data)
    settings = {"log": {"picture": False, "tensorboard": False}}
    result = distloop.fit(task, train={"epochs": 1}, strategy={"name": strategy}, **settings)
    print(f"steps {result.steps}", flush=True)
if RANK == 1:
    raise ValueError("the user's own bug")
distloop.fit(task, train={"epochs": 1}, **settings)
"""


def test_a_script_trains_twice_and_its_mistake_ends_the_job(mpi: Mpi, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    job = mpirun(2, "script.py", folder=tmp_path, mpi=mpi, seconds=60)
    assert job.out.count("steps 1") == 4, job.err
    assert job.code == 1 and "ValueError: the user's own bug" in job.err


OPEN_MPI_SAYS = {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")} | {
    f"OMPI_COMM_WORLD_{name}": "0" for name in ("RANK", "LOCAL_RANK")
}
MPICH_SAYS = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
TORCHRUN_SAYS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


def test_the_mpirun_of_another_mpi_is_refused(mpi: Mpi, tmp_path: Path) -> None:
    if mpi is not OPEN_MPI:
        pytest.skip("what the tests themselves have imported is Open MPI")
    for says, expected in [
        (MPICH_SAYS, "that of MPICH, but mpi4py found Open MPI, for which each of them is alone"),
        (TORCHRUN_SAYS, "torchrun started this process as rank 0 of 2, which Open MPI takes for rank 0 of 1"),
    ]:
        (job,) = run_command(
            "train", DIGITS, *QUIET, "--world.transport", "mpi", folder=tmp_path, **dict(OPEN_MPI.variables), **says
        )
        assert job.code == 3 and expected in "".join(said(job)), job.err


@pytest.mark.parametrize("missing", ["mpi4py", "mpi4py.MPI"])
def test_without_an_mpi_it_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mpi4py")
    import importlib.util
    import sys

    from distloop.errors import WorldError
    from distloop.transports.mpi import connect
    from distloop.world import World

    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "mpi4py":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorldError, match=r'pip install "distloop\[mpi\]"'):
        connect(World(0, 2, 0, 2, "Open MPI"), timeout=1)


def test_auto_takes_mpi_under_an_mpirun_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from distloop.transports import mpi, process_group
    from distloop.transports.join import join
    from distloop.world import World

    monkeypatch.setattr(mpi, "connect", lambda world, **_: "mpi")
    monkeypatch.setattr(process_group, "connect", lambda world, **_: "torch")
    monkeypatch.delenv("MASTER_ADDR", raising=False)

    def met(launcher: str, name: str = "auto", backend: str = "auto") -> object:
        return join(World(0, 2, 0, 2, launcher), name, backend=backend, torch_collects=True)[0]

    assert met("Open MPI") == met("MPICH") == "mpi"
    assert met("torchrun") == met("Open MPI", backend="nccl") == met("Open MPI", "torch") == "torch"
    assert met("torchrun", "mpi") == "mpi"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert met("Open MPI") == "torch"
    assert met("Open MPI", "mpi") == "mpi"
