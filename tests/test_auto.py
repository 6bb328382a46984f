"""Choosing by measuring: what is picked, what is remembered, and that all ranks pick alike."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from distloop import native
from distloop.collectives import ALL_REDUCE
from distloop.collectives import auto as auto_module
from distloop.collectives.auto import Auto, Costs, calibrate, candidates
from distloop.strategies.plans import sizes
from distloop.transports import ThreadCluster, Transport
from tests.ranks import in_processes, run_command

KIB, MIB = 1 << 10, 1 << 20


def lines(**costs: tuple[float, float]) -> Costs:
    """Return costs of (latency in ms, ms per MiB) by algorithm, as they would be measured."""
    return Costs(
        {name: {size: (a + b * size / MIB) / 1e3 for size in auto_module.SIZES} for name, (a, b) in costs.items()}
    )


def test_the_fastest_is_picked_for_each_size() -> None:
    costs = lines(library=(60, 8), one_shot=(5, 24), direct=(10, 8), ring=(30, 5))
    assert [costs.pick(size) for size in (KIB, 64 * KIB, MIB, 4 * MIB, 64 * MIB)] == [
        "one_shot",
        "one_shot",
        "direct",
        "direct",
        "ring",
    ]
    assert costs.describe() == "one_shot to 256 KiB, direct to 4 MiB, ring beyond"
    assert costs.estimate("direct", 3 * MIB) == pytest.approx(0.034), "straight lines between what was measured"
    assert costs.estimate("direct", 100 * MIB) == pytest.approx(0.81), "and beyond"


def test_the_library_does_what_is_not_clearly_faster_otherwise() -> None:
    assert lines(library=(1, 1), ring=(0.8, 0.8)).pick(MIB) == "library"
    assert lines(library=(1, 1), ring=(0.7, 0.7)).pick(MIB) == "ring"
    assert lines(library=(1, 1), ring=(0.8, 0.8)).pick(KIB) == "ring", "there is more to be gained"


def test_buckets_in_a_row_go_to_the_library_only_if_it_is_clearly_faster() -> None:
    assert lines(library=(1, 1), ring=(1.05, 1.05)).pick(MIB, in_a_row=True) == "ring"
    assert lines(library=(1, 1), ring=(1.2, 1.2)).pick(MIB, in_a_row=True) == "library"
    assert lines(library=(1, 1)).pick(MIB, in_a_row=True) == "library"
    own = torch.zeros(1 << 18)
    costs = lines(library=(1, 1), ring=(1.05, 1.05))
    assert Auto(costs, dict(ALL_REDUCE)).choose(own) == ("ring", ALL_REDUCE["ring"])


def test_one_that_was_given_up_is_not_picked_beyond_what_is_known_of_it() -> None:
    costs = Costs({"library": {KIB: 1e-2, MIB: 1.1e-2, 8 * MIB: 1.5e-2}, "one_shot": {KIB: 1e-3, MIB: 1.1e-3}})
    assert costs.pick(MIB) == "one_shot"
    assert costs.pick(2 * MIB) == "library"


def test_the_table_marks_what_is_picked() -> None:
    text = lines(library=(60, 8), one_shot=(5, 24)).table()
    first = {line.split()[0]: line.split()[1] for line in text.splitlines()}
    assert first == {"algorithm": "1", "library": "60.008", "one_shot": "5.023*"}


def test_buckets_are_as_small_as_is_cheap() -> None:
    slow_start = sizes(Auto(lines(library=(10, 10)), dict(ALL_REDUCE)), 100 * MIB)
    # 10 ms are a twentieth of 200 ms, in which, at 11.25 ms per MiB of the largest, 17.8 MiB travel.
    assert slow_start.most == pytest.approx(17.8 * MIB, rel=0.01)
    assert slow_start.least == pytest.approx(1.78 * MIB, rel=0.01)
    quick_start = sizes(Auto(lines(library=(0.1, 10)), dict(ALL_REDUCE)), 100 * MIB)
    assert (quick_start.most, quick_start.least) == (256 * KIB, 64 * KIB), "no smaller than is worth a bucket"
    assert sizes(Auto(lines(library=(10, 10)), dict(ALL_REDUCE)), 5 * MIB).least is None, "one bucket: none to hide"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "distloop"


def picks(transport: Transport) -> tuple[list[str], float, dict[str, int]]:
    begun = time.monotonic()
    auto = calibrate(transport)
    seconds = time.monotonic() - begun
    for size in (4, 1000, 70_000, 1_000_000):
        tensor = torch.full((size,), transport.rank + 1.0)
        auto(transport, tensor)
        assert (tensor == transport.size * (transport.size + 1) / 2).all()
    measured = {name: len(points) for name, points in auto.costs.seconds.items()}
    return [auto.pick(size) for size in (4, KIB, 64 * KIB, MIB, 16 * MIB)], seconds, measured


@pytest.mark.alone
def test_ranks_pick_alike_and_remember(own_cache: Path) -> None:
    first = ThreadCluster(3).run(picks)
    assert first[0][0] == first[1][0] == first[2][0]
    assert all(seconds < 3 for _, seconds, _ in first)
    assert set(first[0][2]) == {"one_shot", "direct", "ring", "naive_pipelined"}
    (file,) = own_cache.glob("calibration-*.json")
    kept = json.loads(file.read_text())
    again = ThreadCluster(3).run(picks)
    assert [p for p, _, _ in again] == [p for p, _, _ in first]
    ThreadCluster(2).run(picks)
    assert len(list(own_cache.glob("calibration-*.json"))) == 2, "other ranks have measurements of their own"
    fresh = ThreadCluster(3).run(lambda t: calibrate(t, refresh=True).costs.seconds)
    assert fresh[0] == fresh[2]
    assert json.loads(file.read_text()) != kept


@pytest.mark.parametrize(
    "broken", ["", "[]", "{}", '{"ring": {}}', '{"bogus": {"1024": 1.0}}', '{"ring": {"1024": -1}}']
)
def test_a_broken_or_old_memory_is_measured_again(own_cache: Path, broken: str) -> None:
    ThreadCluster(2).run(calibrate)
    (file,) = own_cache.glob("calibration-*.json")
    good = file.read_text()
    assert ThreadCluster(2).run(calibrate)[0].costs.took == 0.0, "remembered"
    file.write_text(broken)
    assert ThreadCluster(2).run(calibrate)[0].costs.took > 0.0
    file.write_text(good)
    long_ago = time.time() - auto_module.KEPT - 60
    os.utime(file, (long_ago, long_ago))
    assert ThreadCluster(2).run(calibrate)[1].costs.took > 0.0


def names(transport: Transport) -> tuple[list[str], list[str]]:
    cpu = torch.device("cpu")
    return list(candidates(transport, None, cpu)), list(candidates(transport, torch.bfloat16, cpu))


def test_candidates_suit_the_ranks() -> None:
    one_host, narrow = in_processes(2, names, over="shared_memory")[0]
    assert one_host == ["library", "one_shot", "direct", "ring", "naive_pipelined", "shared_memory"]
    assert narrow == ["one_shot", "direct", "shared_memory"]
    assert ThreadCluster(2).run(lambda t: list(candidates(t, None, torch.device("cuda"))))[0] == ["library"]


def test_calibrate_prints_what_it_found(tmp_path: Path) -> None:
    ends = run_command("calibrate", folder=tmp_path, ranks=2, XDG_CACHE_HOME=str(tmp_path))
    assert [end.code for end in ends] == [0, 0], ends[0].err
    assert "milliseconds on 2 ranks" in ends[0].out and "auto takes" in ends[0].out
    assert "shared_memory" in ends[0].out
    assert not ends[1].out
    assert list((tmp_path / "distloop").glob("calibration-*.json"))
    alone = run_command("calibrate", folder=tmp_path)[0]
    assert alone.code == 3
    assert "one rank has nobody to sum gradients with" in alone.err


def test_the_cache_is_a_folder_of_this_process_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert native.cache().is_dir()
    assert native.cache() == native.cache()
