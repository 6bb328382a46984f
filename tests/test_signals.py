"""Signals end a process that waits in C++, one that still imports, and leave its workers alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distloop.signals import Caught, Terminated

ROOT = Path(__file__).parent.parent
SOON = 2.0

# The main thread waits in C++ for a receiver's message, which Python cannot interrupt.
STUCK = """
import os, sys, threading
import torch, torch.distributed as dist
from datetime import timedelta
from distloop.signals import Caught
asked = []
def ask(number):
    if not asked:
        asked.append(number)
        print("asked", number, flush=True)
with Caught(ask):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print("ready", flush=True)
    store.wait(["never"], timedelta(seconds=60))
"""


def started(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.alone
@pytest.mark.parametrize(("first", "second"), [("INT", "INT"), ("TERM", "TERM"), ("USR1", "TERM"), ("INT", "TERM")])
def test_a_second_signal_ends_a_process_that_hangs(first: str, second: str) -> None:
    one, two = signal.Signals[f"SIG{first}"], signal.Signals[f"SIG{second}"]
    with started("-c", STUCK) as process:
        assert line(process) == "ready"
        process.send_signal(one)
        assert line(process) == f"asked {one.value}"
        if first == "USR1":
            process.send_signal(two)  # asks too, and does not end
        begun = time.monotonic()
        process.send_signal(two)
        if first == "USR1":
            process.send_signal(signal.SIGINT)
            two = signal.SIGINT
        code = process.wait(10)
        assert code in (128 + two, 143), code
        assert time.monotonic() - begun < SOON
        out, err = process.communicate()
        assert (out, err) == ("", "")


IMPORTS = """
import sys, time
from importlib.abc import MetaPathFinder
class Slow(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print("importing", flush=True)
            {wait}
sys.meta_path.insert(0, Slow())
from distloop.cli import main
main(["train", "digits"])
"""
WAITS = {
    "in Python": "time.sleep(60)",
    "in C": "import ctypes; ctypes.PyDLL(None).usleep(100000); ctypes.CDLL(None).sleep(60)",
}


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait", WAITS)
def test_a_signal_during_the_imports_ends_at_once(tmp_path: Path, number: signal.Signals, wait: str) -> None:
    with started("-c", IMPORTS.format(wait=WAITS[wait])) as process:
        assert line(process) == "importing"
        begun = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == 128 + number
        assert time.monotonic() - begun < 1.0
        assert process.communicate() == ("", "")


def test_handlers_and_what_wakes_up_are_restored() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    asked: list[int] = []
    with Caught(asked.append):
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert set(asked) == {signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM}
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1


# A run within the command, both as the command line has them; the process ends with the code of the run.
LATE = """
import signal, sys
from distloop.signals import Caught
with Caught(None):
    with Caught(print):
        pass
    for number in {numbers}:
        signal.raise_signal(number)
    print("borne", flush=True)
    sys.exit(75)
"""


@pytest.mark.parametrize(
    ("numbers", "code"),
    [(["INT"], 75), (["TERM"], 75), (["USR1"], 75), (["USR2", "USR1", "TERM"], 75), (["TERM", "TERM"], 143)],
)
def test_a_signal_that_comes_when_a_run_has_ended_is_borne_and_a_second_ends(numbers: list[str], code: int) -> None:
    signals = [int(signal.Signals[f"SIG{name}"]) for name in numbers]
    with started("-c", LATE.format(numbers=signals)) as process:
        assert process.wait(10) == code
        assert process.communicate() == ("borne\n" if code == 75 else "", "")


EARLY = """
import signal
from distloop.signals import Caught
with Caught(None):
    for name in ("USR1", "USR2"):
        signal.raise_signal(signal.Signals["SIG" + name])
    asked = []
    with Caught(asked.append):
        print(sorted(asked))
    with Caught(print):
        pass
"""


def test_what_asks_for_a_stop_before_a_run_is_for_that_run() -> None:
    with started("-c", EARLY) as process:
        assert process.wait(10) == 0
        assert process.communicate() == ("[10, 12]\n", "")


AT_THE_END = """
import atexit, os, signal, sys
from distloop.signals import Caught
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
with Caught(None):
    with Caught(print):
        pass
    sys.exit(75)
"""


def test_a_signal_while_the_interpreter_ends_is_borne() -> None:
    with started("-c", AT_THE_END) as process:
        assert process.wait(10) == 75
        assert process.communicate() == ("", "")


def test_a_forked_worker_shares_no_pipe_and_outlives_a_ctrl_c() -> None:
    asked: list[int] = []
    with Caught(asked.append) as caught:
        assert caught._pipe is not None
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            states = [
                signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
                signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
            ]
            states += [signal.set_wakeup_fd(-1) == -1]
            os.kill(os.getpid(), signal.SIGINT)
            os.write(writing, bytes(states))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as told:
            assert list(told.read()) == [1, 1, 1]
        assert os.waitpid(child, 0)[1] == 0
        assert asked == []
