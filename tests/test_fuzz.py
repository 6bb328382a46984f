"""Mistakes in configurations and environments are refused, in words; soup ends in nothing worse. See fuzzing.py."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from distloop import resolved as resolved_module
from distloop import settings, yaml_file
from tests import fuzzing
from tests.fuzz_mistakes import MISTAKES
from tests.fuzzing import attempt, campaign, draw_case


def test_nothing_wrong_is_accepted_and_nothing_ends_in_a_traceback(tmp_path: Path) -> None:
    figures = campaign(500, 0, tmp_path)
    wrong = [figures["silently_accepted"], figures["tracebacks"], figures["others"]]
    assert wrong == [0, 0, {}], json.dumps(figures["examples"], indent=1)
    assert figures["accepted"] > 50 and figures["refused"] > 300 and figures["by_command_line"] >= 8
    assert set(MISTAKES) <= set(figures["kinds"]), "each kind of mistake is made"
    assert figures["grown_mib"] < 200


def test_a_case_is_the_same_each_time() -> None:
    assert repr(draw_case(3, 14)) == repr(draw_case(3, 14)) != repr(draw_case(4, 14))


def ignore_unknown_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    validated = settings._validated

    def tolerant(given: Any, learners: Any = None) -> Any:
        known = {
            d: s for d, s in given.items() if d.partition(".")[2] in settings._keys(d.partition(".")[0]) or "task" in d
        }
        return validated(known, learners)

    monkeypatch.setattr(settings, "_validated", tolerant)


def take_the_last_of_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    key = yaml_file._Document._key
    monkeypatch.setattr(yaml_file._Document, "_key", lambda self, event, known, path: key(self, event, {}, path))


def ignore_what_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolved_module.Resolved, "refuse_unread", lambda *_: None)


def let_the_file_win(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = fuzzing.resolve
    monkeypatch.setattr(fuzzing, "resolve", lambda *layers: resolve(*layers[1:], layers[0]))


def call_a_damaged_file_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_file, "strange", lambda text: 1 / 0 if "\0" in text else None)


def forget_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_sentences", lambda failure, merged: iter(["something is wrong"]))


@pytest.mark.parametrize(
    ("plant", "caught"),
    [
        (ignore_unknown_keys, "silently_accepted"),
        (take_the_last_of_duplicates, "silently_accepted"),
        (ignore_what_is_not_read, "silently_accepted"),
        (let_the_file_win, "wrong"),
        (call_a_damaged_file_a_bug, "tracebacks"),
        (forget_the_line, "unnamed"),
    ],
)
def test_planted_bugs_are_found(plant: Any, caught: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for number in range(500):
        if attempt(draw_case(0, number), tmp_path).complaint.startswith(caught):
            return
    pytest.fail(f"nothing is {caught} in 500 cases with {plant.__name__}")


def test_planted_bugs_in_the_world_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distloop import world

    monkeypatch.setattr(world, "_number", lambda env, launcher, name, least: int(env.get(name) or 0))
    found = [attempt(fuzzing.launched(random.Random(n)), tmp_path).complaint.partition(":")[0] for n in range(100)]
    assert {"silently_accepted", "tracebacks"} <= set(found)
