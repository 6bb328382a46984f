"""The house rules that a program can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "distloop"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the ground up; a module may import from its own floor and from those before it (docs/decisions/0001).
FLOORS = [
    ["errors", "ending", "signals"],
    ["world", "master", "native", "host_memory", "control_groups", "memory_limit", "orphans", "cores"],
    ["checkpoints"],
    ["transports"],
    ["collectives", "messages"],
    ["strategies"],
    ["transforms", "schedules"],
    ["optimizer", "cpu_adam"],
    [
        "order",
        "draws",
        "loading",
        "leaves",
        "plan",
        "data",
        "leaf_state",
        "uneven",
        "site",
        "memory",
        "averages",
        "losses",
        "first_step",
    ],
    ["objective", "ahead", "learner", "turns"],
    ["checkpoint", "recording", "own_state"],
    ["loop"],
    ["agreement", "ledger", "evaluation", "records", "monitor", "limits", "saver", "heartbeat", "replicas"],
    ["resumed", "keeper"],
    ["session"],
    ["observers", "tasks"],
    ["values", "yaml_file", "layers", "resolved", "config", "settings"],
    ["build"],
    ["api", "failure", "last_words", "plot", "checkpoint_cli", "targets", "report", "env_cli", "doctor", "doctor_cli"],
    ["launching", "launch_cli", "agent", "agent_codes", "agent_signals", "agent_store"],
    ["cli", "__main__", "__init__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
KNOW_THE_CONFIGURATION = {"config", "settings", "build", "api", "plot", "targets", "cli"}


def part(module: Path) -> str:
    """Return the file or folder of the package that a module belongs to."""
    inner = module.relative_to(PACKAGE)
    return inner.parts[0] if len(inner.parts) > 1 else inner.stem


def imports(module: Path) -> set[str]:
    """Return the parts of the package that a module imports, wherever in the file; not those for type checkers."""
    tree = ast.parse(module.read_text())
    hidden = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "distloop":
            path = node.module.split(".")[1:]
            names |= {path[0]} if path else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("distloop.")}
    return names - {"__version__"}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_imports_go_down(module: Path) -> None:
    for name in imports(module):
        assert FLOOR[name] <= FLOOR[part(module)], f"{module.name} reaches up to {name}"


def test_only_the_command_line_and_build_know_the_configuration() -> None:
    knowing = {part(module) for module in MODULES if imports(module) & {"config", "settings"}}
    assert knowing <= KNOW_THE_CONFIGURATION


def test_nobody_asks_which_strategy_it_is() -> None:
    asked = re.compile(r"isinstance\([^)]*(Strategy|DDP|Single|AllReduce)|strategy(\.name)? *(==|!=|in) ")
    for module in MODULES:
        if part(module) != "strategies":
            for number, line in enumerate(module.read_text().splitlines(), 1):
                assert not asked.search(line), f"{module.name}:{number}: {line.strip()}"


def test_the_loop_has_no_conditions() -> None:
    tree = ast.parse((PACKAGE / "loop.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp | ast.Try | ast.Match)]


def test_nothing_that_is_received_or_read_is_executed() -> None:
    forbidden = re.compile(
        r"\bpickle\b|torch\.load\(|_object_list\(|all_gather_object|(?<!\.)\beval\(|\bexec\(|yaml\.load\(|shell=True|os\.system"
    )
    for module in MODULES:
        for number, line in enumerate(module.read_text().splitlines(), 1):
            assert not forbidden.search(line) or '"""' in line, f"{module.name}:{number}: {line.strip()}"


def test_files_and_functions_can_be_read() -> None:
    for module in MODULES:
        text = module.read_text()
        assert text.count("\n") <= 300, f"{module.name} is longer than 300 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 45, f"{module.name}: {node.name} has {length} lines"


def test_strategies_appear_in_the_parity_tests() -> None:
    from distloop.strategies import STRATEGIES

    text = (Path(__file__).parent / "test_exactness.py").read_text()
    for name in STRATEGIES:
        assert f'"{name}"' in text, f"strategy {name} is in no parity test"
