"""``distloop env``: what it finds, that it never fails, and that no secret gets out."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from distloop import report
from distloop.report import launch, machine, mpi, secrets, versions

ROOT = Path(__file__).parent.parent
CANARY = "canary5150TWEET"  # no shape of its own: what hides it is the name or what stands around it


def env(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distloop", "env", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
    )


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": CANARY,  # of no launcher: not shown whatever it is called
    "MY_OWN": CANARY,
    "http_proxy": f"http://me:{CANARY}@proxy:8080",
    "DISTLOOP_TASK__API_KEY": CANARY,
    "DISTLOOP_TASK__PASSWORD": CANARY,
    "SLURM_JWT": CANARY,
    "TORCH_HUB_TOKEN": CANARY,
    "NVIDIA_API_KEY": CANARY,
    "OMPI_MCA_auth": CANARY,
    "DISTLOOP_TASK__PATH": f"https://user:{CANARY}@host/data.bin",
    "TORCH_HOME": f"s3://{CANARY}@bucket/x",
    "TORCH_LOGS_OUT": f"ssh user:{CANARY}@host",
    "NCCL_NET": f"https://host/x?token={CANARY}&a=1",
    "NCCL_CONF": f"a=1 password: {CANARY}",
    "SLURM_COMMENT": f"Authorization: Bearer {CANARY}",
    "SLURM_ONE": f"ghp_{CANARY}{CANARY}",
    "SLURM_TWO": f"eyJhbGciOiJIUzI1NiJ9.{CANARY}.sig",
    "SLURM_THREE": f"{CANARY}{CANARY}{CANARY}",  # long and mixed
    "DISTLOOP_TASK__CERT": f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}",
}


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_no_secret_gets_out(arguments: tuple[str, ...]) -> None:
    done = env(*arguments, **SECRETS, NCCL_DEBUG="INFO")
    assert done.returncode == 0, done.stderr
    assert CANARY not in done.stdout + done.stderr
    assert "NCCL_DEBUG" in done.stdout and "INFO" in done.stdout
    assert "MY_OWN" not in done.stdout


def test_what_is_no_secret_is_shown() -> None:
    plain = {
        "MASTER_ADDR": "node-1.cluster.example",
        "MASTER_PORT": "29500",
        "SLURM_JOB_NODELIST": "node[001-004,007]",
        "CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,1",
        "NCCL_SOCKET_IFNAME": "=eth0:1",
        "LD_LIBRARY_PATH": "/opt/a-rather-long-folder-name-with-1-digit/lib:/usr/lib",
        "PMIX_SERVER_URI41": "prterun-host-1@0.0;tcp4://127.0.0.1:43215",
        "OMP_NUM_THREADS": "4",
        "TORCH_MONKEY": "banana",
    }
    assert secrets.variables(plain) == dict(sorted(plain.items()))
    assert secrets.variables({"PATH": "/bin", "HOME": "/root", "USER": "me"}) == {}
    assert len(secrets.variables({"NCCL_X": "a " * 1000})["NCCL_X"]) < 400
    assert secrets.variables({"NCCL_X": "a\x1b[31m\nb"})["NCCL_X"] == "a\\x1b[31m\\nb"


def test_it_finds_what_is_here() -> None:
    done = env("--json", RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", SLURM_STEP_ID="0")
    told = json.loads(done.stdout)
    import torch

    assert told["versions"]["torch"].startswith(torch.__version__)
    assert told["versions"]["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert told["launcher"]["found"] == "torchrun: rank 1 of 4, 1 of 2 on this host"
    assert told["launcher"]["why"] == "RANK is set, within Slurm"
    assert torch.backends.cpu.get_cpu_capability() in told["machine"]["instructions"].upper() or (
        torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    )
    assert done.stderr == ""


def test_it_imports_no_torch() -> None:
    code = "import sys; from distloop import report; report.collect(); print({'torch', 'mpi4py'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "set()"


def test_it_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise OSError(f"token={CANARY} cannot\nbe read")

    monkeypatch.setitem(report.SECTIONS, "machine", {"CPU": broken})
    monkeypatch.setattr(secrets, "variables", broken)
    found = report.collect()
    assert found["machine"]["CPU"] == "unknown: OSError: (blanked) cannot be read"
    assert found["variables"] == {"": "unknown: OSError: (blanked) cannot be read"}
    assert "unknown: OSError" in report.text(found)


def test_broken_launchers_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.found().startswith("unclear: RANK=7")
    assert launch.why() == "the variables contradict each other, or some are missing"


def test_processors(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "model name\t: Some CPU\nflags\t\t: fma avx2 avx512f avx512bw avx512dq avx512vl\n"
    )
    assert machine.cpu(tmp_path).startswith("Some CPU, ")
    assert machine.instructions(tmp_path) == "AVX512"
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd bf16\nCPU part\t: 0xd40\n")
    assert machine.instructions(tmp_path) == "NEON, bf16"
    (tmp_path / "cpuinfo").write_text("")
    assert machine.instructions(tmp_path) == "no vector kernels of torch's"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    script(tmp_path / "nvidia-smi", 'echo "0, NVIDIA H100, 81559 MiB, 550.1, 9.0"')
    assert machine.gpus() == ["0: NVIDIA H100, 81559 MiB, compute capability 9.0, driver 550.1"]
    script(tmp_path / "nvidia-smi", "echo Failed to initialize NVML: Driver/library version mismatch; exit 18")
    assert machine.gpus() == ["unknown: nvidia-smi says Failed to initialize NVML: Driver/library version mismatch"]


@pytest.mark.parametrize(
    ("says", "vendor"),
    [
        ("mpirun (Open MPI) 5.0.11", "Open MPI"),
        ("mpirun (PRRTE) 3.0.6", "Open MPI"),
        ("HYDRA build details:\n    Version: 4.2.0", "MPICH"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11", "Intel MPI"),
        ("something else", None),
    ],
)
def test_whose_mpirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, vendor: str | None) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    script(tmp_path / "mpirun", f"echo '{says}'")
    assert mpi.mpirun() == (str(tmp_path / "mpirun"), vendor, says.splitlines()[0])


def test_mpis_of_one_family_start_each_others_ranks() -> None:
    assert mpi.belongs("MPICH", "Intel MPI") and mpi.belongs("Open MPI", "Open MPI")
    assert not mpi.belongs("MPICH", "Open MPI") and not mpi.belongs(None, "Open MPI")


def test_checkouts(tmp_path: Path) -> None:
    assert versions.checkout(tmp_path / "distloop") is None
    (tmp_path / "distloop").mkdir()
    for arguments in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    file = tmp_path / "distloop" / "a.py"
    file.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    subprocess.run(["git", *who, "commit", "-qm", "x"], cwd=tmp_path, check=True)
    clean = versions.checkout(tmp_path / "distloop")
    assert clean is not None and len(clean.removeprefix("commit ")) == 40
    file.write_text("2")
    assert versions.checkout(tmp_path / "distloop") == f"{clean} with changes"
