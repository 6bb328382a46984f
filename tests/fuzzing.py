"""Configurations and environments of every kind, seeded: which are accepted, and what the others end in.

A case is a mistake that must be refused in a sentence that names its place, a valid configuration that must be accepted
with the values of its highest layers, or soup that may be either. Each draws from a generator of its own number:
``python -m tests.long.fuzz --only NUMBER`` does one again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distloop.build import check
from distloop.build.method import as_read
from distloop.build.run_directory import write_configuration
from distloop.errors import ConfigError, DistloopError, WorldError
from distloop.settings import Resolved, from_arguments, from_environment, from_file, from_mapping, resolve
from distloop.tasks import check_options, find_task
from distloop.world import World
from tests import fuzz_worlds
from tests.fuzz_drafts import LAYERS, NAMES, SECTIONS, Draft, valid, variable
from tests.fuzz_mistakes import MISTAKES

SLOW = 2.0  # seconds of CPU
LONGEST, MOST_LINES = 4000, 12  # of an error
LAUNCHED_BY = ("RANK", "WORLD_SIZE", "LOCAL_", "SLURM_", "OMPI_", "PMI_", "MPI_", "DISTLOOP_", "distloop_", "Distloop_")


@dataclass
class Case:
    """What is given to distloop, and what has to come of it."""

    kind: str
    file: bytes = b""
    path: str | None = None  # instead of the file's
    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    python: Mapping[Any, Any] | None = None
    learners: Sequence[str] | None = None  # those of the task
    refused: bool | None = None  # None: it may be
    names: list[str] = field(default_factory=list)
    expected: dict[str, tuple[Any, str]] = field(default_factory=dict)  # value and place by dotted key
    launcher: bool = False  # it is about the world
    world: tuple[int, int, int, int] | None = None


def draw_case(seed: int, number: int) -> Case:
    """Return case ``number`` of a campaign."""
    draw = random.Random(f"{seed}:{number}")
    what = draw.random()
    if what < 0.6:
        return mistaken(draw)
    if what < 0.7:
        return accepted(draw)
    if what < 0.8:
        return launched(draw)
    return soup(draw)


def mistaken(draw: random.Random) -> Case:
    kind = draw.choices(list(MISTAKES), [weight for _, weight in MISTAKES.values()])[0]
    draft = valid(draw)
    MISTAKES[kind][0](draft, draw)
    case = written(kind, draft)
    case.refused = True
    if draft.shown is not None:
        layer, dotted = draft.shown
        places = {"environment": variable(dotted), "arguments": "command line", "python": "argument"}
        case.names.append(places[layer] if layer in places else f"my.yaml:{draft.lines.get(dotted, '')}")
    return case


def accepted(draw: random.Random) -> Case:
    """Return a valid configuration, with what has to come of it: of a learner's values and of those for all."""
    draft = valid(draw)
    case = written("valid", draft)
    case.refused = False
    for name in (None, *NAMES[draft.task]):
        for layer in LAYERS[draft.mode]:
            said = draft.layers[layer]
            own = {d.split(".", 2)[2]: v for d, v in said.items() if name and d.startswith(f"learners.{name}.")}
            general = {dotted: value for dotted, value in said.items() if not dotted.startswith("learners.")}
            for dotted, value in (general | own).items():
                full = f"learners.{name}.{dotted}" if dotted in own else dotted
                place = {"file": "my.yaml:", "environment": variable(full), "arguments": f"--{full}"}
                case.expected[f"{name or ''}:{dotted}"] = (value, place.get(layer, "argument"))
    return case


def written(kind: str, draft: Draft) -> Case:
    text = draft.raw.get("file", draft.text())
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    python = draft.mapping() if draft.mode == "python" else None
    case = Case(kind, data, draft.raw.get("path"), draft.variables(), draft.arguments(), python, NAMES[draft.task])
    case.names = [name.replace("\t", "\\t") for name in draft.names]
    return case


def launched(draw: random.Random) -> Case:
    how = draw.random()
    if how < 0.5:
        env, names = fuzz_worlds.wrong(draw)
        return Case("launcher_mistake", environment=env, refused=True, names=names, launcher=True)
    if how < 0.7:
        _, env, place = fuzz_worlds.right(draw)
        return Case("launcher", environment=env, refused=False, launcher=True, world=place)
    env, _ = fuzz_worlds.soup(draw)
    return Case("launcher_soup", environment=env, launcher=True)


TOKENS = (
    ": ",
    "- ",
    "? ",
    "\n",
    "\n  ",
    "\n    ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "&a",
    "*a",
    "!!str",
    "!",
    "|",
    ">",
    "'",
    '"',
    "#",
    "%",
)
WORDS = (
    "optimizer",
    "lr",
    "name",
    "task",
    "gan",
    "train",
    "log",
    "1",
    "1e-3",
    "null",
    "true",
    "yes",
    "12:30",
    ".nan",
    "é",
    "\t",
)
MORE = (
    "learners",
    "generator",
    "every",
    "~",
    "<<",
    "=",
    "---",
    "...",
    "\0",
    "\x07",
    "\udcff",
    "\u2028",
    "\ufeff",
    "0x1F",
    "2024-01-01",
)


def soup(draw: random.Random) -> Case:
    """Return garbage: bytes, a valid file with some bytes changed, YAML's and JSON's tokens, arguments, variables."""
    draft = valid(draw)
    case = written("", draft)
    case.kind = draw.choice(("bytes", "changed", "tokens", "json", "arguments", "variables"))
    if case.kind == "bytes":
        case.file = draw.randbytes(draw.choice((1, 10, 200)))
    elif case.kind == "changed":
        case.file = changed(case.file, draw)
    elif case.kind == "tokens":
        text = "".join(draw.choice(draw.choice((TOKENS, WORDS, MORE))) for _ in range(draw.choice((3, 10, 60))))
        case.file = text.encode("utf-8", "surrogatepass")
    elif case.kind == "json":
        case.file = json.dumps({draw.choice(SECTIONS): tree(draw, 4) for _ in range(3)}).encode()
    elif case.kind == "arguments":
        signs = ("--", "-", "=", ".", " ", "--optimizer.lr", "--task.x", "--learners.generator.optimizer.lr")
        for _ in range(draw.randrange(1, 6)):
            case.arguments.append("".join(draw.choice((*signs, *WORDS, *MORE)) for _ in range(draw.randrange(1, 5))))
    else:
        for _ in range(3):
            name = "__".join(draw.choice((*WORDS, "A", "", "_")) for _ in range(draw.randrange(4))).upper()
            case.environment[f"DISTLOOP_{name}"] = draw.choice((*WORDS, *MORE, *TOKENS))
    case.python = None
    return case


def changed(data: bytes, draw: random.Random) -> bytes:
    new = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(new))
        if draw.random() < 0.5:
            new[at] = draw.choice((draw.randrange(256), *b" :-\n\t{}[],'\"#&*!|>%@`?0"))
        elif draw.random() < 0.5:
            del new[at : at + draw.randrange(1, 4)]
        else:
            new[at:at] = new[draw.randrange(len(new)) :][: draw.randrange(1, 20)]
        if not new:
            return b""
    return bytes(new)


def tree(draw: random.Random, depth: int) -> Any:
    how = draw.random()
    if depth and how < 0.5:
        keys = ("lr", "name", "every", "a", "", "generator", "optimizer", "<<", "a.b", "\0", "1")
        return {draw.choice(keys): tree(draw, depth - 1) for _ in range(draw.randrange(4))}
    if depth and how < 0.6:
        return [tree(draw, depth - 1) for _ in range(draw.randrange(4))]
    return draw.choice((None, True, 0, -1, 1e-3, 10**30, 1e308, "adam", "", "\n", "é\0", "x" * 200, "gan", 64))


def configure(case: Case, folder: Path) -> Resolved:
    """Do what the commands do with what they are given, without training."""
    path = folder / "my.yaml"
    path.write_bytes(case.file)
    layers = [from_file(path if case.path is None else Path(case.path)), from_environment(case.environment)]
    top = from_arguments(case.arguments) if case.python is None else from_mapping(case.python)
    resolved = resolve(*layers, top)
    check(resolved)
    task, source = resolved.config.task, resolved.source("task.name")
    check_options(find_task(task.name, source), task.name, task.options, source, resolved.sources)
    if case.learners is not None:
        resolved.check_learners(case.learners)
    return resolved


@dataclass
class Found:
    """What a case came to."""

    value: Any = None
    failure: BaseException | None = None
    seconds: float = 0.0
    complaint: str = ""  # what is wrong with it


def attempt(case: Case, folder: Path) -> Found:
    """Try one case and judge what comes of it."""
    found, began = Found(), time.process_time()
    try:
        found.value = World.from_environment(case.environment) if case.launcher else configure(case, folder)
    except BaseException as failure:
        found.failure = failure
    found.seconds = time.process_time() - began
    found.complaint = judge(case, found) or ""
    if not found.complaint and isinstance(found.value, Resolved):
        found.complaint = read_again(found.value, folder) or ""
    return found


def judge(case: Case, found: Found) -> str | None:
    """Return what is wrong with what a case came to, if something is."""
    if found.seconds > SLOW:
        return f"slow: {found.seconds:.1f} s"
    if found.failure is None:
        return "silently_accepted" if case.refused else unexpected(case, found.value)
    kind: type[DistloopError] = WorldError if case.launcher else ConfigError
    if not isinstance(found.failure, kind):
        last = traceback.format_exception(found.failure)[-3:]
        return f"tracebacks: {''.join(last)[-600:]}"
    if case.refused is False:
        return f"wrongly_refused: {found.failure}"
    return misspoken(case, str(found.failure))


def misspoken(case: Case, message: str) -> str | None:
    """Return what is wrong with an error's words."""
    if len(message) > LONGEST or len(message.splitlines()) > MOST_LINES:
        return f"too_long: {len(message)} characters: {message[:200]}"
    if any(not character.isprintable() and character != "\n" for character in message):
        return f"unprintable: {message!r}"
    for name in case.names:
        if name not in message:
            return f"unnamed: {name!r} in {message}"
    if case.launcher and not any(name in message for names in fuzz_worlds.NAMES.values() for name in names if name):
        return None if "SLURM_" in message else f"unnamed: {message}"
    return None


def unexpected(case: Case, resolved: Any) -> str | None:
    """Return which value is not that of the highest layer that has one, or does not know its place."""
    if case.world is not None:
        place = (resolved.rank, resolved.size, resolved.local_rank, resolved.local_size)
        return None if place == case.world else f"wrong: {place} for {case.world}"
    for name, (value, place) in case.expected.items():
        learner, _, dotted = name.partition(":")
        one, (section, _, key) = resolved.for_learner(learner), dotted.partition(".")
        if section == "task":
            got = resolved.config.task.options.get(key) if key != "name" else resolved.config.task.name
        else:
            got = getattr(getattr(one.config, section), key)
        if got != value:
            return f"wrong: {name} is {got!r} and not {value!r}"
        if place not in one.source(dotted):
            return f"wrong: {name} is said to be from {one.source(dotted)} and not from {place}"
    return None


def read_again(resolved: Resolved, folder: Path) -> str | None:
    """Return what is wrong with the file that a run with this configuration would leave, if something is."""
    try:
        write_configuration(folder, resolved)
        again = resolve(from_file(folder / "config.yaml"))
        check(again)
    except Exception as failure:
        return f"not_read_again: {type(failure).__name__}: {str(failure)[:300]}"
    first, second = as_read(resolved), as_read(again)
    first["checkpoint"].pop("resume"), second["checkpoint"].pop("resume")
    return None if first == second else "not_read_again: it says something else"


def forked(case: Case, folder: Path) -> str | None:
    """Give a case to the command line itself, in a child process; return what is wrong with how that ends."""
    (folder / "my.yaml").write_bytes(case.file)
    output = folder / ".output"
    command = ["train", "digits"] if case.launcher else ["config", case.path or "my.yaml", "--json", *case.arguments]
    child = os.fork()
    if child == 0:
        _be_command(command, case.environment, folder, output)
    _, status = os.waitpid(child, 0)
    code, said = os.waitstatus_to_exitcode(status), output.read_text(errors="replace")
    expected = WorldError.exit_code if case.launcher else ConfigError.exit_code
    if "Traceback" in said or code not in (0, expected) or (case.refused is not None and (code == 0) == case.refused):
        return f"exit_code: {code}: {said[-300:]}"
    if code and (len(said) > LONGEST + 500 or not said.startswith("distloop: ")):
        return f"exit_code: {code} with {said[:300]}"
    return None


def _be_command(command: list[str], environment: Mapping[str, str], folder: Path, output: Path) -> None:
    code = 99
    try:
        signal.alarm(30)
        os.chdir(folder)
        for name in [name for name in os.environ if name.startswith(LAUNCHED_BY)]:
            del os.environ[name]
        os.environ |= environment
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        import sys

        from distloop.cli import main

        sys.stdout, sys.stderr = (
            os.fdopen(1, "w", errors="backslashreplace"),
            os.fdopen(2, "w", errors="backslashreplace"),
        )
        main(command)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        import sys

        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def can_fork(case: Case) -> bool:
    """Return whether a command line can be given this: no Python values, null bytes, or what click would take."""
    texts = [*case.arguments, *case.environment, *case.environment.values(), case.path or ""]
    if case.launcher:
        return case.refused is True
    taken = any(a.startswith("-") and not a.startswith("--") for a in case.arguments) or "--" in case.arguments
    nobody = case.learners is not None and "nobody" in f"{case.file!r}{texts}".lower()  # config makes no task
    own = any(a in ("--json", "--traceback", "--help") or "\0" in a or "\udcff" in a for a in texts)
    return (
        case.python is None and not taken and not nobody and not own and "" not in case.environment and case.path != "."
    )


def campaign(
    count: int, seed: int, folder: Path, *, every: int = 25, cases: Callable[[int, int], Case] = draw_case
) -> dict[str, Any]:
    """Try so many cases, some by the command line too; return figures, and examples of what is wrong."""
    began, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kinds: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    examples: dict[str, str] = {}
    slowest, forks = 0.0, 0
    for number in range(count):
        case = cases(seed, number)
        kinds[case.kind] += 1
        found = attempt(case, folder)
        slowest = max(slowest, found.seconds)
        ended["accepted" if found.failure is None else "refused"] += 1
        complaint = found.complaint
        if not complaint and number % every == 0 and can_fork(case):
            forks += 1
            complaint = forked(case, folder) or ""
        if complaint:
            what = complaint.partition(":")[0]
            wrong[what] += 1
            examples.setdefault(f"{what}/{case.kind}", f"{number}: {complaint}")
    with contextlib.suppress(FileNotFoundError):
        (folder / "config.yaml").unlink()
    return {
        "count": count,
        "silently_accepted": wrong.pop("silently_accepted", 0),
        "tracebacks": wrong.pop("tracebacks", 0),
        "others": dict(wrong),
        **ended,
        "by_command_line": forks,
        "slowest": round(slowest, 2),
        "grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) // 1024,
        "seconds": round(time.monotonic() - began, 1),
        "kinds": dict(kinds.most_common()),
        "examples": examples,
    }
