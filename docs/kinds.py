"""Bring the listings and tables of docs/kinds.md up to date with code, configurations and benchmark."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distloop.settings import Resolved, from_file, resolve

HERE = Path(__file__).resolve().parent
PAGE = HERE / "kinds.md"
KINDS = ["masked_lm", "autoencoder", "gan", "contrastive", "dqn", "actor_critic", "dyna", "modem"]
SUPERVISED = ["digits", "byte_lm"]
LOSSES = {
    "digits": "cross-entropy, or `task.loss`",
    "byte_lm": "cross-entropy per byte",
    "masked_lm": "cross-entropy per hidden byte",
    "autoencoder": "squared error",
    "gan": "non-saturating, or `task.loss: minimax`",
    "contrastive": "contrastive, or `task.loss: triplet`",
    "dqn": "Huber loss of the temporal-difference error",
    "actor_critic": "clipped policy surrogate; squared error of the value",
    "dyna": "squared errors and cross-entropy; Huber loss",
    "modem": "cross-entropy of the message",
}


def listing(names: str) -> str:
    """Return the source of ``module:Class.method ...``, without docstrings, as a block of Python."""
    module_name, _, members = names.partition(":")
    module = importlib.import_module(module_name)
    parts: dict[str, list[str]] = {}
    for member in members.split():
        owner, _, method = member.partition(".")
        found: Any = getattr(getattr(module, owner), method)
        parts.setdefault(owner, []).append(_without_docstring(textwrap.dedent(inspect.getsource(found))))
    classes = [f"class {owner}:\n" + textwrap.indent("\n".join(methods), "    ") for owner, methods in parts.items()]
    return "```python\n" + "\n\n".join(classes) + "```"


def methods(_: str = "") -> str:
    """Return the table of losses, optimizers and schedules that the supplied configurations use."""
    lines = ["| configuration | batch | loss | optimizer | schedule | clip |", "|---|---|---|---|---|---|"]
    for kind in [*SUPERVISED, *KINDS]:
        resolved = resolve(from_file(HERE.parent / "configs" / f"{kind}.yaml"))
        own = [(name, resolved.for_learner(name)) for name in resolved.learners]
        cells = [f"`{kind}`", str(resolved.config.data.global_batch_size), LOSSES[kind]]
        optimizers = [_optimizer(resolved)]
        optimizers += [f"{name}: lr {one.config.optimizer.lr:g}" for name, one in own]
        schedule, clip = resolved.config.schedule, resolved.config.gradients.clip_norm
        warm = f", warm-up {schedule.warmup_steps}" if schedule.warmup_steps else ""
        cells += ["; ".join(optimizers), schedule.name + warm, "-" if clip is None else f"norm {clip:g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figures(_: str = "") -> str:
    """Return the table that the benchmark printed."""
    spec = importlib.util.spec_from_file_location("benchmark_of_kinds", HERE.parent / "benchmarks" / "kinds.py")
    assert spec is not None and spec.loader is not None
    kinds = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = kinds  # dataclasses look their module up
    spec.loader.exec_module(kinds)
    results = json.loads((HERE.parent / "benchmarks" / "results" / "kinds.json").read_text())
    table: str = kinds.table(results)
    return table


MAKE: dict[str, Callable[[str], str]] = {"listing": listing, "methods": methods, "figures": figures}


def document(page: str) -> str:
    """Return ``page`` with what stands between its markers made anew."""

    def renewed(found: re.Match[str]) -> str:
        kind, argument = found[1], found[2].strip()
        return f"<!-- {kind}{' ' if argument else ''}{argument} -->\n{MAKE[kind](argument)}\n<!-- /{kind} -->"

    return re.sub(r"<!-- (listing|methods|figures)\b(.*?)-->\n.*?<!-- /\1 -->", renewed, page, flags=re.DOTALL)


def _without_docstring(source: str) -> str:
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is None:
        return source
    first, lines = function.body[0], source.splitlines(keepends=True)
    return "".join(lines[: first.lineno - 1] + lines[first.end_lineno :])


def _optimizer(resolved: Resolved) -> str:
    c = resolved.config.optimizer
    return f"{c.name}, lr {c.lr:g}" + (f", decay {c.weight_decay:g}" if c.weight_decay else "")


if __name__ == "__main__":
    PAGE.write_text(document(PAGE.read_text()))
