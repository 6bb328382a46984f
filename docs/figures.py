"""Bring the tables of pages in docs/ up to date with what benchmarks and long tests wrote."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGES = [HERE / "collectives.md", HERE / "zero.md", HERE / "reliability.md"]
BENCHMARKS = HERE.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"


def load(name: str) -> Any:
    """Return a benchmark as a module."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))  # they import each other
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def all_reduce(section: str) -> str:
    """Return the table of a section as the benchmark printed it; that of ``auto`` by network."""
    found = json.loads((RESULTS / "all_reduce.json").read_text())["sections"][section]
    if found is None:
        return "Not measured."
    module = load("all_reduce")
    if section == "mpi":  # messages by Python take longer than MPI's own at every size; the largest shows how much
        shown = [row for row in found["rows"] if row["ours"] == "shared_memory" or row["what"].endswith("16 MiB")]
        return str(module.table(shown))
    if section != "auto":
        return str(module.table(found["rows"]))
    cells, total = found["rows"][:-3], found["rows"][-3:]
    lines = ["| network | ranks | sizes | geometric mean | least (its quartiles) |", "|---|---|---|---|---|"]
    for (network, ranks), group in itertools.groupby(cells, key=lambda row: network_of(row["what"])):
        own = list(group)
        mean = math.exp(sum(math.log(row["figure"]) for row in own) / len(own))
        least = min(own, key=lambda row: row["figure"])
        size, name = least["what"].split(", ")[-2:]
        span = f"{least['figure']:.2f}x at {size} by {name} ({least['low']:.2f}x to {least['high']:.2f}x)"
        lines.append(f"| {network} | {ranks} | {len(own)} | {mean:.2f}x | {span} |")
    return "\n".join(lines) + "\n\n" + str(module.table(total))


def network_of(what: str) -> tuple[str, str]:
    """Return network and ranks of a cell: of ``hosts, 5 ms, 4 ranks, 1 KiB, one_shot`` the first and the second."""
    found = re.match(r"(.*), (\d+) ranks", what)
    assert found is not None
    return found[1], found[2]


def overlap(_: str = "") -> str:
    """Return the table of step times."""
    found = json.loads((RESULTS / "overlap.json").read_text())
    sent = {name: ", ".join(dict.fromkeys(plan)) for name, plan in found["plans"].items()}
    module = load("overlap")
    ideal = f"Ideal step {1e3 * found['ideal']:.0f} ms. `auto` sent {sent['auto']}."
    return f"{module.table(found['rows'])}\n\n{ideal}"


def calibrate(_: str = "") -> str:
    """Return what ``distloop calibrate`` printed."""
    return "```\n" + (RESULTS / "calibrate.txt").read_text().rstrip() + "\n```"


def cpu_adam(_: str = "") -> str:
    """Return the table of updates on the CPU."""
    module = load("cpu_adam")
    rows = [row for cell in json.loads((RESULTS / "cpu_adam.json").read_text())["cells"] for row in module.rows(cell)]
    return str(module.markdown(module.HEAD, [row.line() for row in rows]))


def offload(section: str) -> str:
    """Return a part of what the benchmark of offloading printed."""
    found = json.loads((RESULTS / "offload.json").read_text()).get(section)
    return "Not measured." if found is None else str(load("offload").PARTS[section][1](found)[0])


def reliability(_: str = "") -> str:
    """Return what the long tests printed when they last ran."""
    path = RESULTS / "reliability.json"
    lines = ["| `python -m tests.long.` | figures | seconds |", "| --- | --- | --- |"]
    for form, figures in sorted(json.loads(path.read_text()).items()) if path.exists() else ():
        shown = {key: v for key, v in figures.items() if key != "seconds" and not isinstance(v, dict | list)}
        told = ", ".join(f"{key.replace('_', ' ')} {_said(value)}" for key, value in shown.items())
        lines.append(f"| `{form}` | {told} | {figures['seconds']:,.0f} |")
    return "\n".join(lines)


def _said(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def safety(_: str = "") -> str:
    """Return the tables of what safety costs."""
    path = RESULTS / "safety.json"
    return str(load("safety").markdown(json.loads(path.read_text()))) if path.exists() else "Not measured."


def deterministic(_: str = "") -> str:
    """Return the table of what the same bits cost."""
    return str(load("deterministic").table(json.loads((RESULTS / "deterministic.json").read_text())["rows"]))


MAKE: dict[str, Callable[[str], str]] = {
    "reliability": reliability,
    "safety": safety,
    "deterministic": deterministic,
    "all_reduce": all_reduce,
    "overlap": overlap,
    "calibrate": calibrate,
    "cpu_adam": cpu_adam,
    "offload": offload,
}


def document(page: str) -> str:
    """Return ``page`` with what stands behind its markers made anew."""

    def renewed(found: re.Match[str]) -> str:
        kind, argument = found[1], found[2].strip()
        mark = f"{kind} {argument}".strip()
        return f"<!-- {mark} -->\n{MAKE[kind](argument)}\n<!-- /{mark} -->"

    kinds = "|".join(MAKE)
    bare = re.sub(rf"<!-- ((?:{kinds})[^>]*?) -->\n.*?<!-- /\1 -->", r"<!-- \1 -->", page, flags=re.DOTALL)
    return re.sub(rf"<!-- ({kinds})\b(.*?)-->", renewed, bare)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(document(path.read_text()))
