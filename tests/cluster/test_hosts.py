"""Several hosts, emulated by network namespaces on one machine: every strategy trains, and whatever dies is named."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.emulated import Hosts, Unavailable
from distloop.strategies import STRATEGIES
from tests.ranks import ROOT, run_command

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

STEPS = 46
QUIET = ("--log.tensorboard", "false", "--log.picture", "false", "--log.progress", "false", "--world.device", "cpu")
DIGITS = ("digits", "--train.max_steps", str(STEPS), "--log.every", "1", *QUIET)
ENDLESS = ("digits", "--train.epochs", "100000", "--log.every", "5", "--world.heartbeat", "3", *QUIET)


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    try:
        with Hosts(request.param, rate="1gbit") as made:
            yield made
    except Unavailable as reason:
        pytest.skip(str(reason))


class Cluster:
    """One agent on each host, with ``per_host`` ranks, under way."""

    def __init__(self, hosts: Hosts, folder: Path, *words: str, per_host: int = 1, agent: Sequence[str] = ()):
        self.folder, self._hosts = folder, hosts
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.agents = []
        for number in range(hosts.count):
            command = [sys.executable, "-m", "distloop.agent", "--nnodes", str(hosts.count)]
            command += ["--node-rank", str(number), "--nproc-per-node", str(per_host)]
            command += ["--master-addr", "h0", "--master-port", "29500", *agent, "-m", "distloop", "train", *words]
            with (folder / f"host{number}.txt").open("w") as output:
                self.agents.append(
                    subprocess.Popen(
                        hosts.command(number, command), cwd=folder, env=environment, stdout=output, stderr=output
                    )
                )

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("host*.txt")))

    def until(self, condition: Callable[[], object], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def training(self) -> None:
        """Wait until the first steps are done."""
        self.until(lambda: re.search(r"step +\d", (self.folder / "host0.txt").read_text()))

    def pids(self, host: int, what: str) -> list[int]:
        """Return the processes of a host that run the module ``what``."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._hosts.namespace(host)], capture_output=True, text=True, check=True
        )
        return [pid for pid in map(int, found.stdout.split()) if what in _words(pid)]

    def wait(self, seconds: float, but: int | None = None) -> list[int]:
        """Return the agents' exit codes; all of them, or all ``but`` one, end in time."""
        self.until(lambda: all(a.poll() is not None for n, a in enumerate(self.agents) if n != but), seconds)
        return [agent.returncode for agent in self.agents]

    def end(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                agent.kill()
            agent.wait()


def _words(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def ranks_of(cluster: Cluster, host: int) -> list[int]:
    return [pid for pid in cluster.pids(host, "-m distloop train") if "distloop.agent" not in _words(pid)]


def last_loss(run: Path) -> float:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([record["loss"] for record in records if record["kind"] == "train"][-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> float:
    folder = tmp_path_factory.mktemp("alone")
    assert run_command("train", *DIGITS, "--log.name", "run", folder=folder)[0].code == 0
    return last_loss(folder / "runs" / "run")


@pytest.mark.parametrize("hosts", [2, 4], indirect=True, ids=["2 hosts", "4 hosts"])
def test_every_strategy_trains_over_hosts(
    hosts: Hosts, tmp_path: Path, alone: float, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for name in sorted(STRATEGIES):
        if name == "deepspeed" and not _has_deepspeed():
            rows.append(f"{name:<14}not installed")
            continue
        (folder := tmp_path / name).mkdir()
        cluster = Cluster(hosts, folder, *DIGITS, "--strategy.name", name, "--log.name", "run")
        try:
            assert cluster.wait(120) == [0] * hosts.count, cluster.said()
        finally:
            cluster.end()
        result = json.loads((folder / "runs" / "run" / "result.json").read_text())
        loss = last_loss(folder / "runs" / "run")
        assert loss == pytest.approx(alone, rel=1e-5), name
        rows.append(f"{name:<14}loss {loss:.6f}  {result['seconds'] / STEPS * 1000:7.1f} ms per step")
    with capsys.disabled():
        print(f"\n{hosts.count} hosts of 1 Gbit/s, 1 rank each; one process has loss {alone:.6f}")
        print("\n".join(rows))


def _has_deepspeed() -> bool:
    import importlib.util

    return importlib.util.find_spec("deepspeed") is not None


def kill_rank(cluster: Cluster, hosts: Hosts) -> None:
    os.kill(ranks_of(cluster, 1)[0], signal.SIGKILL)


def kill_agent(cluster: Cluster, hosts: Hosts) -> None:
    os.kill(cluster.pids(1, "distloop.agent")[0], signal.SIGKILL)


def kill_host(cluster: Cluster, hosts: Hosts) -> None:
    for pid in cluster.pids(1, "distloop"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def freeze_rank(cluster: Cluster, hosts: Hosts) -> None:
    os.kill(ranks_of(cluster, 1)[0], signal.SIGSTOP)


def cut_link(cluster: Cluster, hosts: Hosts) -> None:
    hosts.cut(1)


@pytest.mark.parametrize("hosts", [2], indirect=True, ids=["2 hosts"])
@pytest.mark.parametrize("strategy", ["ring", "ddp"])
@pytest.mark.parametrize(
    ("harm", "codes", "named"),
    [
        (kill_rank, {10}, r"rank 1 has not been heard from for .* on h1 \(process \d+\)"),
        (kill_agent, {10}, r"rank 1 has not been heard from for .* on h1 \(process \d+\)"),
        (kill_host, {10}, r"rank 1 has not been heard from for .* on h1 \(process \d+\)"),
        (freeze_rank, {11}, r"rank 1 has not been heard from for 3 s.* on h1 \(process \d+\): it, its host or the net"),
        (cut_link, {11}, r"rank 1 has not been heard from for 3 s.* on h1 \(process \d+\): it, its host or the net"),
    ],
)
def test_what_dies_is_named_and_nobody_is_left(
    hosts: Hosts,
    tmp_path: Path,
    strategy: str,
    harm: Callable[[Cluster, Hosts], None],
    codes: set[int],
    named: str,
) -> None:
    words = (*ENDLESS, "--strategy.name", strategy, "--log.name", "run", "--world.timeout", "30")
    cluster = Cluster(hosts, tmp_path, *words)
    try:
        cluster.training()
        begun = time.monotonic()
        harm(cluster, hosts)
        cluster.until(lambda: cluster.agents[0].poll() is not None, 40)
        print(f"{harm.__name__} {strategy}: host 0 ended after {time.monotonic() - begun:.1f} s")
        assert cluster.agents[0].returncode in codes, cluster.said()
        assert re.search(named, cluster.said()), cluster.said()
        assert "Traceback" not in cluster.said(), cluster.said()
        if harm is cut_link:
            hosts.heal(1)
        cluster.wait(60)
        cluster.until(lambda: not any(cluster.pids(host, "distloop") for host in range(2)), 10)
    finally:
        cluster.end()


@pytest.mark.parametrize("hosts", [2], indirect=True, ids=["2 hosts"])
def test_the_host_of_the_store_dies(hosts: Hosts, tmp_path: Path) -> None:
    cluster = Cluster(
        hosts, tmp_path, *ENDLESS, "--strategy.name", "ring", "--log.name", "run", "--world.timeout", "30"
    )
    try:
        cluster.training()
        for pid in cluster.pids(0, "distloop"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cluster.until(lambda: cluster.agents[1].poll() is not None, 40)
        assert cluster.agents[1].returncode == 10, cluster.said()
        told = (tmp_path / "host1.txt").read_text()
        assert re.search(r"the launcher on h0, .*has ended|rank 0 has not been heard from .* on h0", told), told
        cluster.until(lambda: not any(cluster.pids(host, "distloop") for host in range(2)), 10)
    finally:
        cluster.end()


@pytest.mark.parametrize("hosts", [3], indirect=True, ids=["3 hosts"])
def test_ranks_by_hand_and_the_first_dies(hosts: Hosts, tmp_path: Path) -> None:
    """Without an agent rank 0 keeps the store: with it the others lose all they could ask."""
    ranks = []
    for number in range(3):
        own = {"RANK": str(number), "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | own
        environment |= {"MASTER_ADDR": "h0", "MASTER_PORT": "29511"}
        command = [sys.executable, "-m", "distloop", "train", *ENDLESS, "--strategy.name", "ring", "--log.name", "run"]
        with (tmp_path / f"host{number}.txt").open("w") as output:
            ranks.append(
                subprocess.Popen(
                    hosts.command(number, command), cwd=tmp_path, env=environment, stdout=output, stderr=output
                )
            )

    def until(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            texts = [path.read_text() for path in sorted(tmp_path.glob("host*.txt"))]
            assert time.monotonic() < deadline, "\n".join(texts)
            time.sleep(0.05)

    try:
        until(lambda: re.search(r"step +\d", (tmp_path / "host0.txt").read_text()))
        ranks[0].kill()
        until(lambda: all(rank.poll() is not None for rank in ranks))
        assert [rank.returncode for rank in ranks] == [-signal.SIGKILL, 10, 10]
        told = [(tmp_path / f"host{number}.txt").read_text() for number in (1, 2)]
        assert any(
            re.search(r"rank 0, which keeps their store, has ended or cannot be reached.* on h0", t) for t in told
        )
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("hosts", [2], indirect=True, ids=["2 hosts"])
def test_a_short_outage_is_survived(hosts: Hosts, tmp_path: Path) -> None:
    words = ("digits", "--train.max_seconds", "15", "--train.epochs", "100000", *QUIET, "--world.heartbeat", "8")
    cluster = Cluster(hosts, tmp_path, *words, "--log.name", "run", "--strategy.name", "ring")
    try:
        cluster.training()
        hosts.cut(1)
        time.sleep(3)
        hosts.heal(1)
        assert cluster.wait(90) == [0, 0], cluster.said()
    finally:
        cluster.end()
