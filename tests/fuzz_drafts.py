"""Configurations to fuzz with: what is valid, said again here by hand, and how it is written down in each layer.

Nothing here is taken from the schema: what is right and wrong is decided twice, and has to come to the same.
"""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass, field
from typing import Any

COUNT = ((1, 2, 7, 64), (0, -1, 1.5, 10**30, "12", True, [], math.nan, math.inf, "1O"))
COUNT0 = ((0, 1, 5), (-1, 0.5, 10**40, "0", False, {}, math.nan))
POSITIVE = (
    (1e-3, 0.5, 3, 1e-8),
    (0, -1, -1e-9, math.nan, math.inf, -math.inf, "1e-3", True, None, [1], 10**200, 1e300),
)
NOT_NEGATIVE = ((0, 0.01, 2.5), (-1e-6, math.nan, math.inf, "0", False, None, 1e300))
FRACTION = ((0, 0.5, 1), (-0.1, 1.01, math.nan, "1", True, 2))
BELOW_ONE = ((0.0, 0.5, 0.99), (1, 1.0, -0.5, math.nan, "0.5", True, None))
SWITCH = ((True, False), (0, 1, "yes", "no", "on", "off", "true", None, 1.0, "True", []))
TEXT = (("a", "über"), ("", 12, 1.5, True, ["a"], {"a": 1}, "a\0b", "a\x1b[31m", "\ud800"))


def choice(*names: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    wrong = [f"{names[0]}x", str(names[0]).upper(), "", True, None, 99, [names[0]], f" {names[0]}", "\u200b"]
    return names, tuple(wrong)


def optional(kind: tuple[tuple[Any, ...], tuple[Any, ...]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (*kind[0], None), tuple(bad for bad in kind[1] if bad is not None)


# Every key that any method reads: values that are right, and values that are wrong.
KEYS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "data.global_batch_size": ((64, 128), COUNT[1]),
    "data.micro_batch_size": optional(((1, 2, 7, 64), COUNT[1])),
    "data.shuffle": SWITCH,
    "data.workers": (COUNT0[0], (*COUNT0[1], 10**6)),
    "data.prefetch": COUNT,
    "data.pin_memory": SWITCH,
    "data.worker_timeout": (POSITIVE[0], (*POSITIVE[1], 1e9)),
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.decay_biases_and_norms": SWITCH,
    "optimizer.lr_scaling": choice("none", "linear", "sqrt"),
    "optimizer.reference_batch_size": COUNT,
    "schedule.warmup_steps": COUNT0,
    "schedule.warmup_start": optional(FRACTION),
    "gradients.clip_norm": optional(POSITIVE),
    "gradients.clip_value": optional(POSITIVE),
    "strategy.bucket_mb": optional(POSITIVE),
    "strategy.unused_parameters": choice("refuse", "zeros"),
    "train.epochs": optional(COUNT),
    "train.max_steps": optional(COUNT),
    "train.max_seconds": optional(POSITIVE),
    "train.seed": ((0, 5, 2**62), (-1, 2**63, 1.0, "1", True, None)),
    "evaluate.every_epochs": optional(COUNT),
    "evaluate.every_steps": optional(COUNT),
    "evaluate.batch_size": COUNT,
    "monitor.metric": optional(TEXT),
    "monitor.mode": optional(choice("min", "max")),
    "monitor.patience": optional(COUNT0),
    "monitor.min_delta": NOT_NEGATIVE,
    "monitor.target": ((0.5, -3, None), (math.nan, math.inf, "1", True, 1e300)),
    "monitor.keep_best": SWITCH,
    "monitor.explosion": optional(POSITIVE),
    "checkpoint.enabled": SWITCH,
    "checkpoint.every_steps": optional(COUNT),
    "checkpoint.every_epochs": optional(COUNT),
    "checkpoint.every_seconds": optional(POSITIVE),
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_every": optional(COUNT),
    "checkpoint.background": SWITCH,
    "checkpoint.grace": POSITIVE,
    "checkpoint.resume": (("auto", "runs/a", None), TEXT[1]),
    "log.every": COUNT,
    "log.directory": TEXT,
    "log.name": (("a", "a b", "x/y", None), (*TEXT[1], "../a", "/tmp/a", "a/../../b", "x" * 300)),
    "log.progress": optional(SWITCH),
    "log.tensorboard": optional(SWITCH),
    "log.picture": optional(SWITCH),
    "log.observers": (([], ["a:b"]), ("a:b", [1], [["a"]], None, {}, [None], [""], True)),
    "world.device": choice("auto", "cpu", "cuda"),
    "world.backend": choice("auto", "gloo", "nccl"),
    "world.transport": choice("auto", "torch", "sockets", "shared_memory", "mpi"),
    "world.shared_memory": SWITCH,
    "world.timeout": (POSITIVE[0], (*POSITIVE[1], 1e9)),
    "world.heartbeat": ((0, 0.5, 10, None), (-1, math.nan, math.inf, "10", True, 1e9)),
    "world.bind": choice("none", "auto", "cores"),
    "world.threads": optional(((1, 2), (*COUNT[1], 10**6))),
}
METHODS: dict[str, dict[str, dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]]] = {
    "optimizer.name": {
        "sgd": {"momentum": BELOW_ONE},
        "rmsprop": {"momentum": BELOW_ONE, "eps": POSITIVE, "alpha": BELOW_ONE},
        "adam": {
            "betas": (([0.9, 0.99], [0, 0.5]), ([0.9], [0.9, 1], [1, 2, 3], 0.9, "ab", [True, 0.5])),
            "eps": POSITIVE,
        },
        "adamw": {"eps": POSITIVE},
    },
    "schedule.name": {
        "constant": {},
        "step": {"every": COUNT, "gamma": ((0.1, 1), (0, -1, 2, math.nan, True))},
        "linear": {"steps": optional(COUNT), "final": FRACTION},
        "cosine": {"steps": optional(COUNT), "final": FRACTION},
        "one_cycle": {"peak": ((0.3,), (0, 1, -1, math.nan)), "start_div": POSITIVE, "final_div": POSITIVE},
        "plateau": {"patience": COUNT0, "threshold": NOT_NEGATIVE},
    },
    "strategy.name": {
        "ddp": {},
        "naive": {},
        "ring": {},
        "direct": {"wire_dtype": choice("fp32", "bf16")},
        "auto": {"wire_dtype": choice("fp32", "bf16"), "calibration": choice("cached", "fresh")},
        "zero_offload": {
            "accumulate": choice("device", "shard"),
            "device_fraction": FRACTION,
            "delayed_update": SWITCH,
        },
    },
    "precision.name": {"fp32": {}, "bf16": {}, "fp16": {"loss_scale": POSITIVE, "growth_interval": COUNT}},
    "monitor.nonfinite": {"stop": {}, "skip": {"most_skipped": COUNT}},
}
SECTIONS = sorted({key.partition(".")[0] for key in (*KEYS, *METHODS)} | {"task", "learners"})
NAMES = {"gan": ("generator", "discriminator"), "digits": ("digits",), "byte_lm": ("model",)}
OPTIONS = {"gan": {"average": 0.5}, "digits": {}, "byte_lm": {}}
OF_LEARNERS = {
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "gradients.clip_norm": optional(POSITIVE),
}
LAYERS = {"command": ("file", "environment", "arguments"), "python": ("file", "environment", "python")}


def known_keys(section: str) -> set[str]:
    """Return every key of a section that some method reads, and those that no draft sets."""
    own = {key.partition(".")[2] for key in KEYS if key.startswith(f"{section}.")}
    for chooser, methods in METHODS.items():
        if chooser.startswith(f"{section}."):
            own |= {chooser.partition(".")[2], *(key for keys in methods.values() for key in keys)}
    rest = {"optimizer": {"nesterov", "options"}, "precision": {"weights"}, "train": {"deterministic", "leaves"}}
    rest |= {"strategy": {"stage", "offload", "cpu_adam", "deepspeed"}, "task": {"name", *OPTIONS["gan"]}}
    return own | rest.get(section, set())


@dataclass
class Draft:
    """What is said in each layer, by dotted key; and what a mutation adds to it as it stands."""

    task: str
    mode: str
    layers: dict[str, dict[str, Any]]
    raw: dict[str, Any] = field(default_factory=dict)  # file text or bytes, variables, arguments, mapping
    names: list[str] = field(default_factory=list)  # what an error has to have in it
    shown: tuple[str, str] | None = None  # layer and dotted key whose place it has to name
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def top(self) -> str:
        return LAYERS[self.mode][-1]

    def put(self, layer: str, dotted: str, value: Any) -> None:
        """Say ``value`` in one layer, and nothing of it in the others."""
        for keys in self.layers.values():
            keys.pop(dotted, None)
        self.layers[layer][dotted] = value

    def text(self) -> str:
        """Return the file, and keep the line of every key."""
        sections: dict[str, list[str]] = {}
        for dotted in self.layers["file"]:
            sections.setdefault(dotted.partition(".")[0], []).append(dotted)
        lines: list[str] = []
        for section, keys in sections.items():
            lines.append(f"{section}:")
            if section == "learners":
                self._learners(lines, keys)
                continue
            for dotted in keys:
                lines.append(f"  {dotted.partition('.')[2]}: {rendered(self.layers['file'][dotted])}")
                self.lines[dotted] = len(lines)
        return "".join(f"{line}\n" for line in lines)

    def _learners(self, lines: list[str], keys: list[str]) -> None:
        for name in dict.fromkeys(dotted.split(".")[1] for dotted in keys):
            lines.append(f"  {name}:")
            place, parts = len(lines), {}
            for dotted in (d for d in keys if d.split(".")[1] == name):
                parts.setdefault(dotted.split(".")[2], []).append(dotted)
                self.lines[dotted] = place
            for section, dotteds in parts.items():
                inner = ", ".join(f"{d.split('.', 3)[3]}: {rendered(self.layers['file'][d])}" for d in dotteds)
                lines.append(f"    {section}: {{{inner}}}")

    def variables(self) -> dict[str, str]:
        said = self.layers["environment"].items()
        return {variable(dotted): rendered(value) for dotted, value in said} | self.raw.get("environment", {})

    def arguments(self) -> list[str]:
        arguments: list[str] = []
        for number, (dotted, value) in enumerate(self.layers.get("arguments", {}).items()):
            text = rendered(value)
            arguments += [f"--{dotted}={text}"] if number % 2 else [f"--{dotted}", text]
        return arguments + self.raw.get("arguments", [])

    def mapping(self) -> dict[Any, Any]:
        sections: dict[Any, Any] = {}
        for dotted, value in self.layers.get("python", {}).items():
            inner, parts = sections, dotted.split(".")
            for part in parts[:-1]:
                inner = inner.setdefault(part, {})
            inner[parts[-1]] = value
        return sections | self.raw.get("python", {})


def variable(dotted: str) -> str:
    return "DISTLOOP_" + dotted.replace(".", "__").upper()


def rendered(value: Any) -> str:
    """Return a value as YAML writes it."""
    if isinstance(value, str):
        return value if re.fullmatch("[a-z_]+", value) and value not in ("true", "false", "null") else json.dumps(value)
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if isinstance(value, list):
        return "[" + ", ".join(map(rendered, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {rendered(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def valid(draw: random.Random) -> Draft:
    """Return a configuration that must be accepted, spread over the layers that one run can have."""
    task, mode = draw.choice(["gan", "gan", "digits", "byte_lm"]), draw.choice(["command", "command", "python"])
    draft = Draft(task, mode, {layer: {} for layer in LAYERS[mode]})
    draft.layers["file"]["task.name"] = task
    for key, value in OPTIONS[task].items():
        draft.put(draw.choice(LAYERS[mode]), f"task.{key}", value)
    for chooser, methods in METHODS.items():
        if draw.random() < 0.5:
            name = draw.choice(sorted(methods))
            draft.put(draw.choice(LAYERS[mode]), chooser, name)
            for key, (good, _) in methods[name].items():
                if draw.random() < 0.5:
                    layer = draw.choice(LAYERS[mode])
                    draft.put(layer, f"{chooser.partition('.')[0]}.{key}", draw.choice(good))
    for dotted in draw.sample(sorted(KEYS), draw.randrange(1, 7)):
        for layer in draw.sample(LAYERS[mode], draw.choice((1, 1, 2, 3))):
            draft.layers[layer][dotted] = draw.choice(KEYS[dotted][0])
    if task == "gan" and draw.random() < 0.7:
        for dotted in draw.sample(sorted(OF_LEARNERS), 2):
            layer, name = draw.choice(LAYERS[mode]), draw.choice(NAMES["gan"])
            draft.layers[layer][f"learners.{name}.{dotted}"] = draw.choice(OF_LEARNERS[dotted][0])
    return draft
