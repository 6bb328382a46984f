"""A rank for tests of the agent, without torch: ``agent_rank.py WORD,WORD FOLDER``, a word for each rank.

A number ends it with that code, a little later on later ranks. ``kill`` kills it, ``ask`` has it end with 75 once all
have had a signal, ``late`` is one that starts slowly, ``hang`` takes no notice of any signal.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from distloop.orphans import follow_launcher
from distloop.signals import Caught

follow_launcher()
rank, asked = int(os.environ["RANK"]), list[int]()
word, folder = sys.argv[1].split(",")[rank], Path(sys.argv[2])
with (folder / f"started-{rank}").open("a") as file:
    file.write(f"{os.getpid()}\n")


def ask(number: int) -> None:
    if number not in asked:
        asked.append(number)
        (folder / f"asked-{rank}").write_text(" ".join(map(str, asked)))


def wait_for(what: str) -> None:
    while len(list(folder.glob(f"{what}-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)


if word == "late":
    time.sleep(1)
with Caught(ask):
    (folder / f"ready-{rank}").touch()
    if word.isdigit() or word == "kill":
        wait_for("ready")
        time.sleep(0.2 * rank)
        os.kill(os.getpid(), signal.SIGKILL) if word == "kill" else os._exit(int(word))
    while word == "hang":
        time.sleep(0.02)
    wait_for("asked")
    time.sleep(0.3)
os._exit(75)
