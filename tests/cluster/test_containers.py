"""docker/Dockerfile built and run by podman or docker, whichever is there: who it runs as, stops, goes on, two hosts.

TEST_BASE_IMAGE takes the place of python:3.11-slim, which is not downloaded: without either the tests are
skipped. TEST_IMAGE_BUILD has further arguments of the build, such as a pip configuration where there is a mirror.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.ranks import ROOT, run_command
from tests.test_docker import agent

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

IMAGE = "localhost/distloop:test"
SAFE = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
DIGITS = ("train", "/configs/digits.yaml", "--log.name", "digits", "--log.picture", "false")
PER_EPOCH = 23  # steps of these digits
STOPPED = 75 if agent() == "distloop.agent" else 1  # torchrun ends with 1 however its ranks ended


@dataclass
class Engine:
    """A container engine, and what is to be removed in the end."""

    program: str
    base: str
    left: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, *arguments: str, seconds: float = 120, code: int | None = 0) -> str:
        done = subprocess.run(
            [self.program, *arguments], capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT
        )
        assert code is None or done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def start(self, name: str, *options: str, command: tuple[str, ...]) -> None:
        self.left.insert(0, ("rm", "--force", name))
        self("run", "--detach", "--name", name, *SAFE, *options, IMAGE, *command)

    def wait_for(self, name: str, line: str) -> None:
        deadline = time.monotonic() + 120
        while line not in (log := self("logs", name)):
            assert time.monotonic() < deadline, log
            assert self("inspect", "--format", "{{.State.Status}}", name).strip() in ("running", "created"), log
            time.sleep(0.2)

    def stop(self, *names: str) -> list[int]:
        self("stop", "--time", "100", *names)
        return [int(self("inspect", "--format", "{{.State.ExitCode}}", name)) for name in names]

    def read(self, volume: str, path: str) -> str:
        return self("run", "--rm", *SAFE, "--network", "none", "--volume", f"{volume}:/work", IMAGE, "/bin/cat", path)


def missing(program: str, base: str) -> str | None:
    """Return why this engine cannot build from this base, if so."""
    if shutil.which(program) is None:
        return f"there is no {program}"
    done = subprocess.run([program, "image", "inspect", base], capture_output=True, text=True, check=False, timeout=60)
    return f"{program} has no image {base} here: {done.stderr.strip()[-100:]}" if done.returncode else None


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    base = os.environ.get("TEST_BASE_IMAGE", "python:3.11-slim")
    reasons = {program: missing(program, base) for program in ("podman", "docker")}
    found = next((program for program, why in reasons.items() if why is None), None)
    if found is None:
        pytest.skip("; ".join(why for why in reasons.values() if why))
    engine = Engine(found, base)
    more = shlex.split(os.environ.get("TEST_IMAGE_BUILD", ""))
    bases = ("--build-arg", f"BASE={base}", "--build-arg", f"PYTHON={base}")
    engine("build", "--file", "docker/Dockerfile", "--tag", IMAGE, *bases, *more, ".", seconds=800)
    yield engine
    for arguments in engine.left:
        with suppress(subprocess.TimeoutExpired):
            engine(*arguments, code=None)


@pytest.fixture
def volume(engine: Engine, request: pytest.FixtureRequest) -> str:
    name = f"distloop-test-{os.getpid()}-{abs(hash(request.node.name)) % 10000}"
    engine("volume", "create", name)
    engine.left.append(("volume", "rm", "--force", name))
    return name


def test_it_is_nobody_and_can_write_only_where_it_should(engine: Engine, volume: str) -> None:
    probe = "id -u; touch /x /opt/distloop/x; touch /work/x /tmp/x && echo written; command -v cc gcc; tini --version"
    said = engine("run", "--rm", *SAFE, "--volume", f"{volume}:/work", IMAGE, "/bin/sh", "-c", probe)
    assert said.startswith("1000\n")
    assert said.count("Read-only file system") == 2
    assert "written" in said
    assert "cc" not in said.split()


def test_its_helpers_are_compiled(engine: Engine) -> None:
    probe = (
        "from distloop import native; [native.load(name) for name in ('adam', 'norm', 'shared_memory')]; print('all')"
    )
    assert engine("run", "--rm", *SAFE, "--network", "none", IMAGE, "python", "-c", probe).strip() == "all"


@pytest.mark.parametrize("user", ["1000:1000", "12345:12345"])
def test_two_ranks_are_stopped_and_go_on(engine: Engine, volume: str, user: str) -> None:
    options = ("--user", user, "--volume", f"{volume}:/work", "--network", "none", "--env", "PET_NPROC_PER_NODE=2")
    name = f"{volume}-a"
    engine.start(name, *options, command=(*DIGITS, "--strategy.name", "auto", "--train.epochs", "5000"))
    engine.wait_for(name, "step")
    assert engine.stop(name) == [STOPPED]
    log = engine("logs", name)
    assert "saved         go on with: distloop train --resume runs/digits" in log
    assert "do not share memory" not in log
    steps = json.loads(engine.read(volume, "runs/digits/result.json"))["steps"]
    epochs = str(steps // PER_EPOCH + 2)
    said = engine("run", "--rm", *SAFE, *options, IMAGE, *DIGITS, "--resume", "auto", "--train.epochs", epochs)
    assert f"resumed       from step {steps}, of 2 ranks" in said
    assert "all epochs done" in said


def test_two_containers_are_two_hosts(engine: Engine, volume: str) -> None:
    network = f"{volume}-net"
    engine("network", "create", "--internal", "--subnet", "10.213.77.0/24", network)
    engine.left.append(("network", "rm", network))
    for run in ("a", "b"):
        names = [f"{volume}-{run}{rank}" for rank in range(2)]
        steps = 0 if run == "a" else json.loads(engine.read(volume, "runs/digits/result.json"))["steps"]
        epochs = "5000" if run == "a" else str(steps // PER_EPOCH + 2)
        for rank, name in enumerate(names):
            variables = (
                f"PET_NODE_RANK={rank}",
                "PET_NNODES=2",
                "PET_MASTER_ADDR=10.213.77.10",
                "PET_MASTER_PORT=29500",
            )
            options = [word for variable in variables for word in ("--env", variable)]
            options += ["--network", network, "--ip", f"10.213.77.1{rank}", "--volume", f"{volume}:/work"]
            engine.start(name, *options, command=(*DIGITS, "--resume", "auto", "--train.epochs", epochs))
        engine.wait_for(names[0], "step" if run == "a" else "all epochs done")
        codes = engine.stop(*names) if run == "a" else [int(engine("wait", name)) for name in names]
        assert codes == ([STOPPED] * 2 if run == "a" else [0, 0])
    assert "resumed       from step" in engine("logs", names[0])


def test_two_containers_end_in_the_bits_of_one_process(engine: Engine, volume: str, tmp_path: Path) -> None:
    settings = ("--train.epochs", "2", "--train.deterministic", "true", "--world.device", "cpu")
    words = (
        "train",
        str(ROOT / "configs" / "digits.yaml"),
        "--log.name",
        "digits",
        "--log.picture",
        "false",
        *settings,
    )
    assert run_command(*words, folder=tmp_path)[0].code == 0
    expected = hashlib.sha256((tmp_path / "runs" / "digits" / "model.safetensors").read_bytes()).hexdigest()
    network = f"{volume}-net"
    engine("network", "create", "--internal", "--subnet", "10.213.78.0/24", network)
    engine.left.append(("network", "rm", network))
    names = [f"{volume}-s{rank}" for rank in range(2)]
    for rank, name in enumerate(names):
        variables = (f"PET_NODE_RANK={rank}", "PET_NNODES=2", "PET_MASTER_ADDR=10.213.78.10", "PET_MASTER_PORT=29500")
        options = [word for variable in variables for word in ("--env", variable)]
        options += ["--network", network, "--ip", f"10.213.78.1{rank}", "--volume", f"{volume}:/work"]
        engine.start(name, *options, command=(*DIGITS, *settings))
    assert [int(engine("wait", name)) for name in names] == [0, 0], engine("logs", names[0])
    digest = ("/usr/bin/sha256sum", "/work/runs/digits/model.safetensors")
    said = engine("run", "--rm", *SAFE, "--network", "none", "--volume", f"{volume}:/work", IMAGE, *digest)
    assert said.split()[0] == expected
