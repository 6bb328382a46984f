"""Who a process is, from recorded variable sets of each launcher."""

from __future__ import annotations

import pytest
import torch

from distloop.build import place
from distloop.config import Config
from distloop.errors import WorldError
from distloop.transports import Alone
from distloop.world import World

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",  # ranks are not always dealt in order
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),2",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World(0, 1, 0, 1, "none")),
        (TORCHRUN, World(3, 4, 1, 2, "torchrun")),
        (OPEN_MPI, World(1, 4, 0, 4, "Open MPI")),
        (MPICH, World(2, 3, 2, 3, "MPICH")),
        (SLURM, World(5, 8, 1, 3, "Slurm")),
        (SLURM | {"SLURM_NODEID": "2"}, World(5, 8, 1, 2, "Slurm")),
        (SLURM | TORCHRUN, World(3, 4, 1, 2, "torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(1, 2, 1, 2, "torchrun", False)),
        # One that starts a rank per host by hand may say the number on the host alone: it chooses the GPU.
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, World(3, 4, 0, 4, "torchrun", False)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, World(3, 4, 1, 4, "torchrun", False)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, World(3, 4, 3, 4, "torchrun", False)),
        (SLURM | {"RANK": "5", "WORLD_SIZE": "8"}, World(5, 8, 1, 3, "torchrun")),  # a common recipe in job scripts
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, World(0, 1, 0, 1, "none")),  # salloc's shell is no rank
    ],
)
def test_world_from_environment(environment: dict[str, str], world: World) -> None:
    assert World.from_environment(environment) == world


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, "RANK=4 .* outside the world: WORLD_SIZE=4 allows ranks 0 to 3"),
        ({"RANK": "-1"}, "RANK=-1 is too small"),
        ({"RANK": "abc"}, "RANK='abc' is not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is too small"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 .* outside the host"),
        ({"RANK": "٣"}, "RANK='٣' is not a whole number"),
        ({"RANK": " 3"}, "RANK=' 3' is not a whole number"),
        ({"RANK": "1_0"}, "RANK='1_0' is not a whole number"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9+... is too large"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5 .* cannot be: .* WORLD_SIZE=4"),
    ],
)
def test_contradictions_are_named(change: dict[str, str], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        World.from_environment(TORCHRUN | change)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(WorldError, match=f"{name} is missing"):
        World.from_environment({k: v for k, v in TORCHRUN.items() if k != name})


def test_single_host() -> None:
    assert World(0, 2, 0, 2).single_host
    assert not World(0, 4, 0, 2).single_host
    assert not World(0, 2, 0, 2, "torchrun", False).single_host


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "abc"}, "LOCAL_RANK='abc'"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"},
            r"LOCAL_RANK=2 .* outside the host: WORLD_SIZE=2 allows local ranks 0 to 1",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_RANK is missing"),
        ({"PMI_SIZE": "4"}, "PMI_RANK is missing"),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x999999999)"},
            "SLURM_LOCALID=1 .*SLURM_STEP_TASKS_PER_NODE=1 allows",
        ),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),,2"}, r"SLURM_STEP_TASKS_PER_NODE='3\(x2\),,2' is not like"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3x2"}, "SLURM_STEP_TASKS_PER_NODE='3x2' is not like"),
        (SLURM | {"SLURM_NODEID": "9"}, "SLURM_NODEID=9 is outside the 3 nodes"),
        (SLURM | {"SLURM_NODEID": "²"}, "SLURM_NODEID='²'"),
        (SLURM | {"SLURM_LOCALID": "²"}, "SLURM_LOCALID='²'"),
        ({"RANK": "5", "WORLD_SIZE": "8"} | SLURM | {"SLURM_LOCALID": "7"}, "SLURM_LOCALID=7 .* outside the host"),
    ],
)
def test_mistakes_are_named_wherever_they_are(environment: dict[str, str], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        World.from_environment(environment)


@pytest.mark.parametrize(
    ("world", "gpus", "shown", "expected"),
    [
        (World(3, 4, 1, 2, "torchrun"), 2, False, 1),
        (World(3, 4, 1, 2, "torchrun"), 1, True, 0),  # each rank is shown its own
        (World(3, 4, 1, 2, "torchrun"), 1, False, None),
        (World(3, 4, 3, 4, "torchrun", False), 1, False, 0),  # by hand on four hosts with a GPU each
        (World(3, 4, 0, 4, "torchrun", False), 4, False, 0),
        (World(3, 4, 3, 4, "torchrun", False), 2, False, None),
    ],
)
def test_each_rank_takes_its_gpu(
    monkeypatch: pytest.MonkeyPatch, world: World, gpus: int, shown: bool, expected: int | None
) -> None:
    taken: list[int] = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device.index))
    monkeypatch.setattr(place, "set_threads", lambda *_: "")
    monkeypatch.setattr(place, "agree_on", lambda *_, **__: None)
    if expected is None:
        with pytest.raises(WorldError, match=f"local rank {world.local_rank} has no GPU of its own"):
            place.make_place(Config(), world, Alone())
    else:
        assert place.make_place(Config(), world, Alone()).device == torch.device("cuda", expected)
    assert taken == ([] if expected is None else [expected])
