"""Write docs/configuration.md from the schema: python docs/configuration.py."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

from distloop.config import Config
from distloop.layers import LEARNERS

HEAD = """# Configuration

Written by `make docs` from the schema; `distloop config FILE` shows what a file comes to. A value is set in a YAML file
(section, key), by an environment variable (`DISTLOOP_OPTIMIZER__LR=0.1`), on the command line (`--optimizer.lr 0.1`),
or in Python (`fit(task, optimizer={"lr": 0.1})`); the later wins over the earlier.
"""

OF_LEARNERS = """
## learners

Where a task has several learners, what one of them does otherwise: below its name, keys of `optimizer`, `schedule` and
`gradients`, as in `learners: {generator: {optimizer: {lr: 1e-4}}}` or `--learners.generator.optimizer.lr 1e-4`. In a
file what is said of one learner wins over what is said of all; the command line wins over both.
"""


def document() -> str:
    """Return the page."""
    parts = [HEAD]
    for section, field in Config.model_fields.items():
        if section == LEARNERS:
            parts.append(OF_LEARNERS)
            continue
        model: Any = field.annotation
        parts.append(f"\n## {section}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        for key, inner in model.model_fields.items():
            default = json.dumps(inner.get_default())
            parts.append(f"| `{key}` | {kind(inner.annotation)} | `{default}` | {inner.description} |\n")
        if section == "task":
            parts.append("\nOther keys of this section are the arguments of the task's constructor.\n")
    return "".join(parts)


def kind(annotation: Any) -> str:
    """Return a type as people write it."""
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(map(str, typing.get_args(annotation)))
    arguments = typing.get_args(annotation)
    if type(None) in arguments:
        return " or ".join([*(kind(a) for a in arguments if a is not type(None)), "null"])
    if typing.get_origin(annotation) is typing.Annotated:
        return kind(arguments[0])
    if typing.get_origin(annotation) in (list, dict):
        return "list" if typing.get_origin(annotation) is list else "mapping"
    return {"int": "whole number", "float": "number", "str": "text", "bool": "true, false"}[annotation.__name__]


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(document())
