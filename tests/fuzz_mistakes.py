# ruff: noqa: RUF001 - letters that look like others are what is meant
"""Mistakes that users make in configurations: each takes a valid draft, and makes one that must be refused.

A mistake notes in ``draft.names`` and ``draft.shown`` what the error has to name.
"""

from __future__ import annotations

import decimal
import math
import random
from collections.abc import Callable
from typing import Any

from tests.fuzz_drafts import KEYS, METHODS, NAMES, OF_LEARNERS, SECTIONS, Draft, known_keys, rendered, variable

Mistake = Callable[[Draft, random.Random], None]
LONG = 100_000


def typo(word: str, draw: random.Random, known: set[str]) -> str:
    """Return a word with a slip of the finger in it, which is none of those that are known."""
    while True:
        at = draw.randrange(len(word))
        other = draw.choice("abcdefghijklmnopqrstuvwxyz_оеа1")  # some of them Cyrillic
        new = draw.choice(
            (
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
                word[:at] + other + word[at + 1 :],
                word[:at] + other + word[at:],
                word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
                word + "s",
            )
        )
        if new and new not in known and "__" not in new and not new.startswith("_") and not new.endswith("_"):
            return new


def place(draft: Draft, layer: str, dotted: str, value: Any) -> None:
    draft.put(layer, dotted, value)
    draft.shown = (layer, dotted)


def wrong_value(draft: Draft, draw: random.Random) -> None:
    """Of the wrong type, out of its range, no number, or none of the choices."""
    methods = {
        f"{chooser.partition('.')[0]}.{key}": (chooser, name, kind)
        for chooser, by_name in METHODS.items()
        for name, keys in by_name.items()
        for key, kind in keys.items()
    }
    layer = draw.choice(sorted(draft.layers))
    if draw.random() < 0.3:
        dotted = draw.choice(sorted(methods))
        chooser, name, kind = methods[dotted]
        for keys in draft.layers.values():  # what another method reads would be refused for that
            for key in [key for key in keys if key.startswith(chooser.partition(".")[0] + ".") and key not in KEYS]:
                del keys[key]
        draft.put(layer, chooser, name)
        place(draft, layer, dotted, draw.choice(kind[1]))
    else:
        dotted = draw.choice(sorted(KEYS))
        place(draft, layer, dotted, draw.choice(KEYS[dotted][1]))
    draft.names.append(dotted)


def wrong_choice(draft: Draft, draw: random.Random) -> None:
    chooser = draw.choice(sorted(METHODS))
    good = draw.choice(sorted(METHODS[chooser]))
    bad = (
        typo(good, draw, set(METHODS[chooser])),
        good.upper(),
        "",
        None,
        3,
        True,
        [good],
        f"{good} ",
        "nosuch",
        "a:" * 400,
    )
    place(draft, draw.choice(sorted(draft.layers)), chooser, draw.choice(bad))


def unknown_key(draft: Draft, draw: random.Random) -> None:
    section = draw.choice([name for name in SECTIONS if name not in ("learners", "task")])
    known = known_keys(section)
    layer, key = draw.choice(sorted(draft.layers)), typo(draw.choice(sorted(known)), draw, known)
    if draw.random() < 0.2:  # of another section
        key = draw.choice(sorted({"lr", "epochs", "metric", "timeout", "warmup_steps", "clip_norm", "shuffle"} - known))
    place(draft, layer, f"{section}.{key}", draw.choice((1, "a", None, True, 0.5)))


def unknown_section(draft: Draft, draw: random.Random) -> None:
    section = typo(draw.choice(SECTIONS), draw, set(SECTIONS))
    place(draft, draw.choice(sorted(draft.layers)), f"{section}.{draw.choice(['lr', 'name', 'x'])}", 1)


def task_mistake(draft: Draft, draw: random.Random) -> None:
    layer = draw.choice(sorted(draft.layers))
    if draw.random() < 0.5:
        name = draw.choice(
            ["nosuch", "Digits", "", "digits ", "digits:", ":Digits", "no.such:Task", "..x:y", "1", "a:b:c"]
        )
        place(draft, layer, "task.name", name)
    else:
        place(draft, layer, f"task.{draw.choice(['nosuch', 'widht', 'lr', 'self'])}", 1)


def contradiction(draft: Draft, draw: random.Random) -> None:
    """Keys that cannot all be meant: one that the chosen method does not read, or two that exclude each other."""
    order = list(draft.layers)
    low, high = sorted(draw.choices(range(len(order)), k=2))
    pairs: list[list[tuple[str, Any]]] = [
        [("optimizer.name", "sgd"), ("optimizer.betas", [0.8, 0.9])],
        [("optimizer.name", "sgd"), ("optimizer.eps", 1e-3)],
        [("optimizer.name", "adam"), ("optimizer.momentum", 0.9)],
        [("optimizer.name", "adamw"), ("optimizer.alpha", 0.9)],
        [("optimizer.name", "adamw"), ("optimizer.options", {"a": 1})],
        [("optimizer.name", "sgd"), ("optimizer.nesterov", True)],
        [("schedule.name", "constant"), ("schedule.every", 10)],
        [("schedule.name", "cosine"), ("schedule.gamma", 0.5)],
        [("schedule.name", "plateau"), ("schedule.final", 0.5)],
        [("strategy.name", "ddp"), ("strategy.wire_dtype", "bf16")],
        [("strategy.name", "naive"), ("strategy.stage", 3)],
        [("strategy.name", "direct"), ("strategy.device_fraction", 0.5)],
        [("strategy.name", "ring"), ("strategy.deepspeed", {"a": 1})],
        [("precision.name", "bf16"), ("precision.loss_scale", 8.0)],
        [("precision.name", "fp32"), ("precision.growth_interval", 8)],
        [("strategy.name", "ddp"), ("precision.weights", "half")],
        [("monitor.nonfinite", "stop"), ("monitor.most_skipped", 3)],
        [("train.deterministic", False), ("train.leaves", 4)],
        [("train.deterministic", True), ("strategy.name", "ring")],
        [("train.deterministic", False), ("strategy.name", "tree")],
        [("data.global_batch_size", 8), ("data.micro_batch_size", 9)],
    ]
    first, second = draw.choice(pairs)
    heads = {first[0].partition(".")[0], second[0].partition(".")[0], "precision", "strategy"}
    for keys in draft.layers.values():
        for key in [k for k in keys if k.partition(".")[0] in heads or k.startswith("learners")]:
            del keys[key]
    draft.put(order[low], *first)
    draft.put(order[high], *second)
    draft.names.append(second[0])


def duplicate(draft: Draft, draw: random.Random) -> None:
    how = draw.randrange(4)
    if how == 0:
        draft.raw["file"] = draft.text() + draw.choice(("extra:\n  a: 1\n  a: 1\n", "task:\n  name: gan\n", "task:\n"))
        draft.names.append("my.yaml:")
    elif how == 1:
        draft.put("file", "log.every", 2)
        lines = draft.text().splitlines(keepends=True)  # of another section it may be the value, too
        draft.raw["file"] = "".join([*lines[: (at := draft.lines["log.every"])], '  "every": 3\n', *lines[at:]])
        draft.names += [f"my.yaml:{draft.lines['log.every'] + 1}", "duplicate"]
    elif how == 2:
        draft.put("environment", "log.every", 2)
        draft.raw["environment"] = {draw.choice(("DISTLOOP_LOG__every", "DISTLOOP_Log__EVERY")): "3"}
        draft.names += ["DISTLOOP_L", "twice"]
    else:
        draft.mode, draft.layers = (
            "command",
            {k: v for k, v in draft.layers.items() if k != "python"} | {"arguments": {}},
        )
        again = draw.choice((["--log.every", "2", "--log.every=3"], ["--train.max-steps=2", "--train.max_steps", "3"]))
        draft.raw["arguments"] = again
        draft.names.append("given twice")


def learner_mistake(draft: Draft, draw: random.Random) -> None:
    layer, name = draw.choice(sorted(draft.layers)), draw.choice(NAMES[draft.task])
    dotted = draw.choice(sorted(OF_LEARNERS))
    how = draw.randrange(6)
    if how == 0:
        path, value = f"learners.{name}.{dotted}", draw.choice(OF_LEARNERS[dotted][1])
    elif how == 1:
        path, value = f"learners.{name}.optimizer.{typo('weight_decay', draw, known_keys('optimizer'))}", 1
    elif how == 2:
        section = draw.choice(("data", "train", "optimiser", "strategy", "learners", "world"))
        path, value = f"learners.{name}.{section}.lr", 1
    elif how == 3:
        path, value = f"learners.nobody.{dotted}", OF_LEARNERS[dotted][0][0]
    elif how == 4:
        path, value = f"learners.{name}.schedule.name", draw.choice(("cosin", 3, None))
    else:
        path, value = f"learners.{name}.optimizer.betas", [0.5]
    for keys in draft.layers.values():
        for key in [key for key in keys if key.startswith("learners.")]:
            del keys[key]
    place(draft, layer, path, value)
    draft.names.append("learner")


def learner_shape(draft: Draft, draw: random.Random) -> None:
    for keys in draft.layers.values():
        for key in [key for key in keys if key.startswith("learners.")]:
            del keys[key]
    name = NAMES[draft.task][0]
    bad = draw.choice(
        (
            f"learners: {name}\n",
            f"learners:\n  {name}: 3\n",
            f"learners:\n  {name}: null\n",
            f"learners:\n  {name}: {{optimizer: 3}}\n",
            f"learners:\n  {name}: {{optimizer.lr: 3}}\n",
            f"learners:\n  {name}.optimizer: {{lr: 3}}\n",
            f"learners.{name}:\n  optimizer: {{lr: 3}}\n",
            f"learners:\n  {name}: [optimizer]\n",
            f"learners:\n  {name}: {{lr: 3}}\n",
            f"learners:\n  {name}: {{optimizer: [lr, 3]}}\n",
            "learners:\n  '': {optimizer: {lr: 3}}\n",
            f"learners:\n  {name}: {{optimizer: {{lr: {{a: 1}}}}}}\n",
        )
    )
    draft.raw["file"] = draft.text() + bad
    draft.names.append("my.yaml:")


def variable_mistake(draft: Draft, draw: random.Random) -> None:
    dotted = draw.choice(sorted(KEYS))
    for keys in draft.layers.values():
        keys.pop(dotted, None)
    right, good = variable(dotted), rendered(KEYS[dotted][0][0])
    section, key = dotted.upper().split(".")
    wrong = {
        right.replace("__", "_"): good,
        right.lower(): good,
        f"Distloop_{section}__{key}": good,
        f"DISTLOOP__{section}__{key}": good,
        f"DISTLOOP_{section}___{key}": good,
        f"DISTLOOP_{section}__{key}_": good,
        f"DISTLOOP_{section}__{key}__X": good,
        f"DISTLOOP_{section}__": good,
        f"DISTLOOP___{key}": good,
        "DISTLOOP_": good,
        "DISTLOOP___": good,
        f"DISTLOOP_{section}.{key}": good,
        f"DISTLOOP_{section}-{key}": good,
    }
    name = draw.choice(sorted(wrong))
    text = wrong[name]
    if draw.random() < 0.3:
        name, text = (
            right,
            draw.choice(
                ("", " ", "\t", "[1", "{", "'", '"', "*a", "!!int 3", "&", "%YAML 1.1\n--- 3", "\n---\n", "1 # 2")
            ),
        )
    draft.raw["environment"] = {name: text}
    draft.names.append(name)


def argument_mistake(draft: Draft, draw: random.Random) -> None:
    draft.mode = "command"
    draft.layers = {layer: draft.layers.get(layer, {}) for layer in ("file", "environment", "arguments")}
    dotted = draw.choice(sorted(KEYS))
    for keys in draft.layers.values():
        keys.pop(dotted, None)
    good, (section, key) = rendered(KEYS[dotted][0][0]), dotted.split(".")
    draft.raw["arguments"] = draw.choice(
        (
            [f"--{dotted}"],
            [f"--{dotted}", "--log.every=3"],
            [f"--{dotted}="],
            [f"--{dotted}", ""],
            [f"--{dotted}= "],
            [f"-{dotted}", good],
            [dotted, good],
            [f"{dotted}={good}"],
            [f"--{section}", good],
            [f"--{section}.", good],
            [f"--.{key}", good],
            [f"--{key}", good],
            [f"--{dotted}.x", good],
            [f"--{dotted}:", good],
            [f"--{dotted}==", good],
            [f"--{dotted.upper()}", good],
            [f"--{section}..{key}", good],
            [f"--{section}__{key}", good],
            [f"---{dotted}", good],
            [f"--{dotted}", good, "3"],
            [f"—{dotted}", good],
            [f"--{dotted}={good} # as before"],
            ["--=3"],
            [""],
            ["="],
        )
    )
    draft.names.append("command line")


def yaml_mistake(draft: Draft, draw: random.Random) -> None:
    bad: list[str | bytes] = [
        "a: [1\n", "a: {b: 1\n", "a: 'b\n", 'a: "b\n', "a:\n\tb: 1\n", "log:\n  every: 1\n every: 2\n", "- 1\n", "3\n",
        "x: &a [1]\ny: *a\n", "log:\n  <<: {every: 1}\n", "<<: {log: {every: 1}}\n",
        "log: !!map {every: 1}\n", "log:\n  every: !!int 3\n", "log: !!python/object:os.system {}\n",
        "x: !!python/object/apply:os.system [echo]\n", "---\nlog: {every: 2}\n", "log: 3\n", "log: [every]\n",
        "log: text\n",
        "? [a]\n: 1\n", "log:\n  ? {a: b}\n  : 1\n", "log:\n  null: 1\n", "log:\n  1: 2\n", "log:\n  true: 1\n",
        "x:\n  y: " + "[" * 30 + "]" * 30 + "\n", "x:\n  y: " + "[" * 3000 + "\n",
        "x: " + "{a: " * 50 + "1" + "}" * 50 + "\n",
        "log:\n  every: " + "9" * 5000 + "\n", "log:\n  every: 0x" + "f" * 5000 + "\n", "log: 0x" + "f" * 9000 + "\n",
        "log:\n  every: 1\n  ? " + "x" * 5000 + "\n  : 1\n", "x" * 2000 + ": 1\n", "log:\n  every: 12:30\n",
        "log:\n  progress: yes\n", "log:\n  every: １\n", "log:\n  every: −1\n",
        "log:\n  every: 1 000\n", "log:\n  every: 1,000\n",
        "log:\n  name: \"a\\0b\"\n", "log:\n  name: \"\\ud800\"\n", "log:\n  name: a\x00b\n",
        "log:\n  name: a\x07b\n", "log:\n  every:1\n",
        "log:\n  every: 1\n  every : 2\n", "log.every: 1\n",
        "log: {every: 1}}\n",
        "x: @a\n", "x: `a`\n", "log:\n\u00a0 every: 1\n",
        b"log:\n  name: \xff\xfe\n", b"\xff\xfel\x00o\x00g\x00", "# x\n" * 80_000, "x: [" + "1," * 20_000 + "]\n",
        "a: &a [1,1]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n", "log:\n  observers: [" + "1, " * 2000 + "]\n",
    ]  # fmt: skip
    piece = draw.choice(bad)
    for layer, keys in draft.layers.items():
        for key in [k for k in keys if k.startswith("log.")]:
            del draft.layers[layer][key]
    text = draft.text()
    draft.raw["file"] = text.encode() + piece if isinstance(piece, bytes) else text + piece
    draft.names.append("my.yaml")


def directive(draft: Draft, draw: random.Random) -> None:
    """Another YAML, where 12:30 is 750 and ``yes`` is true."""
    draft.raw["file"] = draw.choice(("%YAML 1.1\n", "%TAG ! tag:a,2000:\n", "%YAML 1.2\n")) + "---\n" + draft.text()
    draft.names.append("my.yaml:")


def python_mistake(draft: Draft, draw: random.Random) -> None:
    draft.mode = "python"
    draft.layers = {layer: draft.layers.get(layer, {}) for layer in ("file", "environment", "python")}
    draft.layers["python"].clear()
    own: list[Any] = []
    own.append(own)
    deep: Any = 1
    for _ in range(draw.choice((30, 5000))):
        deep = [deep]
    ring: dict[str, Any] = {}
    ring["a"] = ring
    value = draw.choice(
        (
            own,
            deep,
            ring,
            b"a",
            {1, 2},
            decimal.Decimal(1),
            object(),
            1j,
            print,
            {1: 2},
            {None: 1},
            range(3),
            math,
            10**5000,
            -(10**400),
            "a\0",
            "\udcff",
            "\x1b[2J",
            [object()],
            {"a": {"b": b""}},
            bytearray(b"a"),
            [1] * 20_000,
        )
    )
    shapes: list[dict[Any, Any]] = [{"task": {"noise": value}}, {"log": {"name": value}}, {"log": {"every": value}}]
    if not isinstance(value, dict):
        shapes.append({"log": value})
    shapes += [{"log": None}, {"log": {1: 2}}, {"log": {None: 1}}, {"log.every": {"x": 1}}, {"task.x": {"y": 1}}]
    shapes += [
        {"log": {"every.x": 1}},
        {"": {"a": 1}},
        {"log": {"": 1}},
        {"log": {"x" * LONG: 1}},
        {"x" * LONG: {"a": 1}},
    ]
    draft.raw["python"] = draw.choice(shapes)
    draft.names.append("argument")


def long_text(draft: Draft, draw: random.Random) -> None:
    word = draw.choice(("x", "é", "\u202e", "1", "-", "a b", "%s", "{}", "\n", "日")) * draw.choice(
        (501, 501, LONG // 10)
    )
    dotted = draw.choice(
        ("optimizer.lr", "log.every", "optimizer.name", "schedule.name", "strategy.name", "log.observers")
    )
    place(draft, draw.choice(sorted(draft.layers)), draw.choice((dotted, "task.name", "world.device")), word)


def file_mistake(draft: Draft, draw: random.Random) -> None:
    draft.raw["path"] = draw.choice(
        ("no.yaml", ".", "no/my.yaml", "my.yaml/x", "x" * 5000, "a\0b", "\udcff.yaml", "/dev/zero")
    )
    draft.names.append(draft.raw["path"][:20].partition("\0")[0].partition("\udcff")[0])


MISTAKES: dict[str, tuple[Mistake, int]] = {
    "wrong_value": (wrong_value, 8),
    "wrong_choice": (wrong_choice, 2),
    "unknown_key": (unknown_key, 3),
    "unknown_section": (unknown_section, 2),
    "task_mistake": (task_mistake, 1),
    "contradiction": (contradiction, 3),
    "duplicate": (duplicate, 2),
    "learner_mistake": (learner_mistake, 2),
    "learner_shape": (learner_shape, 1),
    "variable_mistake": (variable_mistake, 3),
    "argument_mistake": (argument_mistake, 3),
    "yaml_mistake": (yaml_mistake, 3),
    "directive": (directive, 1),
    "python_mistake": (python_mistake, 2),
    "long_text": (long_text, 1),
    "file_mistake": (file_mistake, 1),
}
