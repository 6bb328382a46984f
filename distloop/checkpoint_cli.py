"""``distloop checkpoint``: what is in the checkpoints of a run, whether they are whole, and files for other tools."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distloop.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from distloop.checkpoints import Checkpoint, Info

ENDINGS = (".safetensors", ".pt", ".pth")
AT_ONCE = 2**22  # elements that are compared at a time
TRACEBACK = click.option("--traceback", is_flag=True, help="Show where in the code an error comes from.")


@click.group(short_help="Look at checkpoints, verify and export them.")
def checkpoint() -> None:
    """Look at the checkpoints of runs, verify them, and write what they hold for other tools.

    Nothing is changed or moved by any of this.
    """


def _command(name: str, summary: str) -> Callable[[Callable[..., int]], click.Command]:
    """Make a command of a function that returns the exit code."""

    def make(function: Callable[..., int]) -> click.Command:
        def run(*, traceback: bool, **arguments: Any) -> None:
            from distloop.failure import guarded

            guarded(lambda: function(**arguments), traceback=traceback)

        run.__doc__ = function.__doc__
        run.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
        return checkpoint.command(name, short_help=summary)(TRACEBACK(run))

    return make


@_command("list", "List a run's checkpoints.")
@click.argument("run", type=click.Path(path_type=Path))
def list_(run: Path) -> int:
    """List the checkpoints of RUN, a run directory, each verified: step, time, size, files, tensors."""
    from distloop.checkpoints import Checkpoints

    store = Checkpoints(_folder(run))
    if not store.steps():
        raise CheckpointError(f"{run}: has no checkpoints")
    rows = []
    for step in store.steps():
        try:
            found = store.open(store.path(step))
        except CheckpointError as failure:
            rows.append((str(step), "", "", "", "", f"damaged: {failure}"))
        else:
            files = found.manifest["files"]
            size = _size(sum(said["bytes"] for said in files.values()))
            rows.append((str(step), _time(found), size, str(len(files)), str(len(found.tensors)), "valid"))
    _table(("step", "time", "size", "files", "tensors", ""), rows)
    return 0


@_command("show", "Show what is in a checkpoint.")
@click.argument("path", type=click.Path(path_type=Path))
def show(path: Path) -> int:
    """Show the facts, the state and the tensors of a checkpoint.

    PATH is a checkpoint's directory, or a run's: then it is the newest valid one.
    """
    found = _find(path)
    size = _size(sum(said["bytes"] for said in found.manifest["files"].values()))
    print(f"{found.path}: step {found.step}, {_time(found)}, {size}")
    _table(("fact", "value"), [(key, _short(value)) for key, value in _flat(found.manifest["facts"])])
    _table(("state", "value"), [(key, _short(value)) for key, value in _flat(found.state)])
    rows = [
        (name, _dtype(info), str(list(info.shape)), ", ".join(dict.fromkeys(piece.file for piece in info.pieces)))
        for name, info in found.tensors.items()
    ]
    _table(("tensor", "dtype", "shape", "in"), rows)
    return 0


@_command("verify", "Say whether checkpoints are whole.")
@click.argument("path", type=click.Path(path_type=Path))
def verify(path: Path) -> int:
    """Verify a checkpoint, or all of a run: every size, every sha256, every header. Exit code 20 if one is damaged."""
    from distloop.checkpoints import Checkpoints

    if _is_checkpoint(path):
        store, paths = Checkpoints(path.parent), [path]
    else:
        store = Checkpoints(_folder(path))
        paths = [store.path(step) for step in store.steps()]
        if not paths:
            raise CheckpointError(f"{path}: has no checkpoints")
    reasons = []
    for one in paths:
        try:
            found = store.open(one)
        except CheckpointError as failure:
            reasons.append(str(failure))
        else:
            print(f"{one}: valid, {len(found.manifest['files'])} files, {len(found.tensors)} tensors")
    if reasons:
        raise CheckpointError("\n".join(reasons))
    return 0


@_command("diff", "Say in what two checkpoints differ.")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
def diff(first: Path, second: Path) -> int:
    """Say in which facts, entries of the state and tensors two checkpoints differ, and by how much.

    FIRST and SECOND are directories of checkpoints, or of runs: then it is the newest valid one.
    """
    one, two = _find(first), _find(second)
    print(f"{one.path} (step {one.step}) and {two.path} (step {two.step})")
    values = [
        *_differences("fact", one.manifest["facts"], two.manifest["facts"]),
        *_differences("state", one.state, two.state),
    ]
    _table(("differs", "first", "second"), values)
    tensors, same = [], 0
    for name in dict.fromkeys([*one.tensors, *two.tensors]):
        said = _compare(name, one, two)
        if said is None:
            same += 1
        else:
            tensors.append((name, said))
    _table(("tensor", "difference"), tensors)
    print(f"{same} tensors are equal in every bit, {len(tensors)} are not")
    return 0


@_command("export", "Write a checkpoint's model for other tools.")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--optimizer", is_flag=True, help="The optimizer's state too.")
def export(path: Path, output: Path, *, optimizer: bool) -> int:
    """Write the model of a checkpoint to OUTPUT: one .safetensors file, or .pt or .pth, a plain torch state_dict.

    PATH is a checkpoint's directory, or a run's: then it is the newest valid one.

    With --optimizer a .pt file holds two tables, "model" and "optimizer" (by parameter, then by name), and a
    .safetensors file has the optimizer's tensors under their names, as in NAME/exp_avg.
    """
    from distloop.checkpoints.export import write_safetensors, write_torch

    if output.suffix not in ENDINGS:
        raise ConfigError(f"command line: {output}: the name of an export ends in {', '.join(ENDINGS)}")
    found = _find(path)
    write = write_safetensors if output.suffix == ".safetensors" else write_torch
    count = write(found, output, optimizer=optimizer)
    print(f"{output}: {count} tensors of {found.path}")
    return 0


def _find(path: Path) -> Checkpoint:
    """Return the checkpoint that a path means, verified."""
    from distloop.checkpoints import Checkpoints

    if _is_checkpoint(path):
        return Checkpoints(path.parent).open(path)
    store = Checkpoints(_folder(path))
    found = store.newest(set_aside=False)
    if found is None:
        raise CheckpointError(f"{path}: has no checkpoints")
    for _, reason in store.damaged:
        print(f"distloop: damaged, the one before is taken: {reason}", file=sys.stderr)
    return found


def _is_checkpoint(path: Path) -> bool:
    return path.absolute().name.startswith("step-") or (path / "MANIFEST.json").exists()


def _folder(path: Path) -> Path:
    """Return where the checkpoints of a run are."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: is no directory of a run or a checkpoint")
    return path if path.absolute().name == "checkpoints" else path / "checkpoints"


def _differences(kind: str, one: Any, two: Any) -> Iterator[tuple[str, str, str]]:
    first, second = ({key: json.dumps(value) for key, value in _flat(values)} for values in (one, two))
    for key in dict.fromkeys([*first, *second]):
        a, b = first.get(key), second.get(key)
        if a != b:
            yield f"{kind} {key}", _cut(a or "-"), _cut(b or "-")


def _compare(name: str, one: Checkpoint, two: Checkpoint) -> str | None:
    """Return how a tensor differs, or None if it does not."""
    if name not in one.tensors or name not in two.tensors:
        return f"only in the {'first' if name in one.tensors else 'second'}"
    a, b = one.tensors[name], two.tensors[name]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{_dtype(a)} {list(a.shape)} and {_dtype(b)} {list(b.shape)}"
    largest, count = 0.0, 0
    for x, y in _stretches(name, one, two):
        unequal, distance = _distance(x, y)
        count, largest = count + unequal, max(largest, distance)
    return f"{count} of {a.numel} elements, by {largest:.3g} at most" if count else None


def _stretches(name: str, one: Checkpoint, two: Checkpoint) -> Iterator[tuple[Tensor, Tensor]]:
    info = one.tensors[name]
    if info.order != two.tensors[name].order:  # elements in another order: all at once, as they belong together
        yield one.read(name).flatten(), two.read(name).flatten()
        return
    for start in range(0, info.numel, AT_ONCE):
        stop = min(start + AT_ONCE, info.numel)
        yield one.read_range(name, start, stop), two.read_range(name, start, stop)


def _distance(x: Tensor, y: Tensor) -> tuple[int, float]:
    """Return how many elements differ in their bits, and the largest difference; NaN against a number is infinite."""
    import torch

    rows = [t.view(torch.uint8).view(len(t), -1) for t in (x, y)]
    unequal = (rows[0] != rows[1]).any(1)
    if not unequal.any():
        return 0, 0.0
    wide = torch.complex128 if x.is_complex() else torch.float64
    a, b = x[unequal].to(wide), y[unequal].to(wide)
    apart = torch.where(a.isnan() & b.isnan() | (a == b), 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
    return int(unequal.sum()), float(apart.max())


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in tables within tables, and in short lists of them, by dotted keys."""
    if isinstance(value, dict) and (value or not prefix):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{prefix}.{index}")
    else:
        yield prefix, value


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}"
    return value if isinstance(value, str) and value.isprintable() else _cut(json.dumps(value))


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _dtype(info: Info) -> str:
    return str(info.dtype).removeprefix("torch.")


def _time(found: Checkpoint) -> str:
    return str(found.manifest["created"])[:19].replace("T", " ")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.text import Text

    texts = [head, *rows]
    if len(texts) == 1:
        return
    widths = [max(len(text[column]) for text in texts) for column in range(len(head))]
    console = Console(highlight=False, soft_wrap=True)
    for number, text in enumerate(texts):
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(text, widths, strict=True)).rstrip()
        console.print(Text(line, style="" if number else "bold"))
