"""Damage to a checkpoint, of every kind and seeded: what of it would a loader accept?

Each mutation changes something, and is either visible to the hashes or contradicts something else in the checkpoint:
who rewrites everything consistently has made another valid checkpoint, which no loader can tell.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distloop.checkpoints import Checkpoint, Checkpoints, Stored
from distloop.errors import CheckpointError, NoCheckpointError
from tests.crashing_disk import QuickDisk

STEP, OTHER = 120, 110
JUNK = (None, True, False, -1, 2**63, 2**70, 1.5, 1e308, "", "x", "nan", [], {}, [1], {"file": 1}, "../x", "F31", "I8")
Files = dict[str, Any]  # by name: bytes, or what is there instead of a file, as (kind, argument)


def save(store: Checkpoints, step: int) -> Checkpoint:
    """Write a small checkpoint of two ranks with every kind of entry."""
    made = torch.Generator().manual_seed(step)

    def random_(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made)

    one, two = store.draft(step, "a"), store.draft(step, "a")
    flat = random_(4 * 2 * 3 * 5)
    model = [
        Stored("layer.weight", random_(5, 7)),
        Stored("layer.bias", random_(7)),
        Stored("steps", torch.tensor(step)),
    ]
    lasts = Stored("conv.weight", random_(3, 5, 2, 4), order=(0, 2, 3, 1))
    one.write("model-00000.safetensors", [*model, lasts], {"tied.weight": "layer.weight"})
    one.write("optim-00000.safetensors", [Stored("big", flat[:50], (4, 5, 2, 3), 0, (0, 2, 3, 1))])
    half = Stored("half", random_(6).to(torch.bfloat16))
    two.write("optim-00001.safetensors", [Stored("big", flat[50:], (4, 5, 2, 3), 50, (0, 2, 3, 1)), half])
    two.report(1, {"generator": [step, 2, 3]})
    one.report(0, {"generator": [step + 1]})
    return one.commit(2, {"step": step, "loss": float("nan")}, {"strategy": "ring"}, timeout=5)


class Mutator:
    """Draws mutations of one checkpoint, given another to swap with."""

    def __init__(self, here: Files, other: Files, draw: random.Random):
        self.here, self.other, self.draw = here, other, draw
        self.name = f"step-{STEP:08d}"

    def __call__(self) -> tuple[str, Files, str]:
        """Return the kind of mutation, the files as they are then, and the name of their directory."""
        self.name = f"step-{STEP:08d}"
        while True:
            kind = self.draw.choices([name for name, _ in KINDS], [KINDS_WEIGHT.get(name, 10) for name, _ in KINDS])[0]
            files = dict(self.here)
            dict(KINDS)[kind](self, files)
            if files != self.here or self.name != f"step-{STEP:08d}":
                return kind, files, self.name

    def file(self, suffix: str = "") -> str:
        return self.draw.choice([name for name in sorted(self.here) if name.endswith(suffix)])

    # What the hashes see.

    def flip(self, files: Files) -> None:
        name = self.file()
        data = bytearray(files[name])
        for _ in range(self.draw.choice((1, 1, 1, 2, 8))):
            data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        files[name] = bytes(data)

    def truncate(self, files: Files) -> None:
        name = self.file()
        files[name] = files[name][: self.draw.randrange(len(files[name]))]

    def extend(self, files: Files) -> None:
        name = self.file()
        files[name] += self.draw.choice((b"\0", b" ", b"\n", b"}", self.draw.randbytes(20)))

    def blank(self, files: Files) -> None:
        name = self.file()
        start = self.draw.randrange(len(files[name]))
        stop = min(len(files[name]), start + self.draw.choice((1, 16, 512)))
        files[name] = files[name][:start] + bytes(stop - start) + files[name][stop:]

    def swap_between(self, files: Files) -> None:
        for name in self.draw.sample(sorted(files), self.draw.randrange(1, len(files))):
            files[name] = self.other[name]

    def swap_within(self, files: Files) -> None:
        one, two = self.draw.sample(sorted(files), 2)
        files[one], files[two] = files[two], files[one]

    def delete(self, files: Files) -> None:
        del files[self.file()]

    def other_kind(self, files: Files) -> None:
        name = self.file()
        files[name] = (self.draw.choice(("link", "folder", "pipe", "dangling")), files[name])

    def stray(self, files: Files) -> None:
        name = self.draw.choice(("model-00001.safetensors", "part-00000.json", "x.json", "part-00001.failed"))
        files[name] = self.draw.choice((("link", b"{}"), b"{}", b"", files["model-00000.safetensors"]))

    def other_directory(self, files: Files) -> None:
        self.name = f"step-{self.draw.choice((1, STEP + 1, OTHER, 10**9)):08d}"

    def header_only(self, files: Files) -> None:
        name = self.file(".safetensors")
        files[name] = self.changed_header(files[name])

    # What is consistent for the hashes, and contradicts itself.

    def header_signed(self, files: Files) -> None:
        name = self.file(".safetensors")
        sign(files, {name: self.changed_header(files[name])})

    def header_length(self, files: Files) -> None:
        name = self.file(".safetensors")
        length = int.from_bytes(files[name][:8], "little")
        new = self.draw.choice((0, 1, 2, length - 8, length + 8, len(files[name]), 2**24, 2**24 + 1, 2**40, 2**64 - 1))
        data = new.to_bytes(8, "little") + files[name][8:]
        sign(files, {name: data}) if self.draw.random() < 0.7 else files.update({name: data})

    def header_bomb(self, files: Files) -> None:
        name = self.file(".safetensors")
        length = 8 + int.from_bytes(files[name][:8], "little")
        header = self.bomb(files[name][8:length])
        sign(files, {name: len(header).to_bytes(8, "little") + header + files[name][length:]})

    def manifest_signed(self, files: Files) -> None:
        manifest = json.loads(files["MANIFEST.json"])
        if self.draw.random() < 0.5:
            self.changed_tables(manifest)
        else:
            self.changed_manifest(manifest)
        resign(files, json.dumps(manifest).encode())

    def json_bomb(self, files: Files) -> None:
        if self.draw.random() < 0.5:
            resign(files, self.bomb(files["MANIFEST.json"]))
        else:
            sign(files, {"state.json": self.bomb(files["state.json"])})

    def state_signed(self, files: Files) -> None:
        sign(files, {"state.json": self.draw.choice((b"[]", b"{}", b"null", b"", b'{"ranks": 1}', b'{"ranks": {}}'))})

    def commit(self, files: Files) -> None:
        found = files["COMMIT"]
        files["COMMIT"] = self.draw.choice(
            (
                found.upper(),
                found.strip(),
                found + b"\n",
                b" " + found,
                b"",
                b"\n",
                found[::-1],
                b"0" * 64 + b"\n",
                found * 9,
            )
        )

    def huge(self, files: Files) -> None:
        data = b'{"ranks": [' + b"[],[]," * 2**23 + b"0]}"
        name = self.draw.choice(("MANIFEST.json", "state.json"))
        resign(files, data) if name == "MANIFEST.json" else sign(files, {name: data})

    def changed_header(self, data: bytes) -> bytes:
        """Return a file whose header tells something else of one tensor, or of one more, or less."""
        length = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:length])
        before = copy.deepcopy(header)
        key = self.draw.choice([key for key in sorted(header) if key != "__metadata__"])
        while header == before:
            how = self.draw.randrange(6)
            if how == 0:
                self.change(header[key])
            elif how == 1:
                header[key]["dtype"] = self.draw.choice(
                    ("F32", "I32", "U32", "F16", "BF16", "F64", "I64", "U64", "F31")
                )
            elif how == 2:
                header[key]["shape"] = self.draw.choice(
                    ([1], [2**40, 2**40], [0], header[key]["shape"][::-1], [-1, -5])
                )
            elif how == 3:
                header[f"{key}x" if self.draw.random() < 0.5 else f"{key}[0:1]"] = header.pop(key)
            elif how == 4:
                header["more"] = copy.deepcopy(header[key])
            else:
                shift = self.draw.choice((-8, 8, 1, 2**40))
                header[key]["data_offsets"] = [n + shift for n in header[key]["data_offsets"]]
        new = json.dumps(header).encode()
        return len(new).to_bytes(8, "little") + new + data[length:]

    def changed_tables(self, manifest: dict[str, Any]) -> None:
        tensors, before = manifest["tensors"], copy.deepcopy(manifest["tensors"])
        name, cut = self.draw.choice(sorted(tensors)), "big"
        while tensors == before:
            how = self.draw.randrange(9)
            if how == 0:
                self.change(tensors[name])
            elif how == 1:
                del tensors[name]
            elif how == 2:
                tensors[self.draw.choice(("more", "../more", "", "a[0:3]", "__metadata__", "\n"))] = tensors.pop(name)
            elif how == 3:
                self.change(self.draw.choice(tensors[cut]["pieces"]))
            elif how == 4:
                pieces = tensors[cut]["pieces"]
                tensors[cut]["pieces"] = self.draw.choice((pieces[:-1], pieces[::-1], [*pieces, pieces[0]]))
            elif how == 5:
                tensors[name]["dtype"] = self.draw.choice(("F32", "I32", "U32", "BF16", "F16", "F64", "I64"))
            elif how == 6 and name != cut:  # a cut's elements have any shape of their number
                tensors[name]["shape"] = [*tensors[name]["shape"], 1]
            elif how == 7:
                tensors["conv.weight"]["order"] = self.draw.choice(([0, 1, 2, 3], [0, 3, 1, 2], [3, 2, 1, 0]))
            elif how == 8:
                tensors[cut]["shape"] = self.draw.choice(([121], [], [119], [4, 5, 2, 4], [0, 0, 0, 0]))
                tensors[cut].pop("order", None)

    def changed_manifest(self, manifest: dict[str, Any]) -> None:
        files, before = manifest["files"], copy.deepcopy(manifest)
        while manifest == before:
            how, name = self.draw.randrange(8), self.draw.choice(sorted(files))
            if how == 0:
                self.change(files[name])
            elif how == 1:
                del files[name]
            elif how == 2:
                evil = (
                    "../x.safetensors",
                    "/etc/passwd",
                    "a/b.json",
                    "..",
                    ".",
                    "",
                    "COMMIT",
                    "MANIFEST.json",
                    "X",
                    "a\0b",
                )
                files[self.draw.choice(evil)] = files[name] if self.draw.random() < 0.5 else files.pop(name)
            elif how == 3:
                del manifest[self.draw.choice(sorted(manifest))]
            elif how == 4:
                manifest[self.draw.choice(("more", "Schema"))] = 1
            elif how == 5:
                manifest["schema"] = self.draw.choice((0, 2, "1", True, None, 1.5, [1]))
            elif how == 6:
                manifest["step"] = self.draw.choice((OTHER, "120", -1, None, True, 10**30, 120.5))
            else:
                key = self.draw.choice(("created", "files", "tensors", "facts"))
                manifest[key] = self.draw.choice([j for j in JUNK if key != "facts" or not isinstance(j, dict)])

    def change(self, table: dict[str, Any]) -> None:
        """Put junk for one value in a table, or for one number in a list there."""
        key = self.draw.choice(sorted(table))
        if isinstance(table[key], list) and table[key] and self.draw.random() < 0.7:
            at = self.draw.randrange(len(table[key]))
            table[key][at] = self.draw.choice((*JUNK, 7777))
        elif self.draw.random() < 0.1:
            del table[key]
            if key == "order":
                table["file"] = None
        else:
            table[key] = self.draw.choice((*JUNK, 7777))

    def bomb(self, data: bytes) -> bytes:
        """Return JSON that costs more than it weighs, or is none."""
        first = json.loads(data)
        key = next(iter(first))
        inner = self.draw.choice(
            (
                b"[" * 100_000,
                b"[" * 900 + b"]" * 900,
                b'{"a":' * 60 + b"1" + b"}" * 60,
                b"9" * 5000,
                b"1e999",
                b"NaN",
                b"-Infinity",
                b"'x'",
                b'"\xff\xfe"',
                b"1, 2",
            )
        )
        return b'{"' + self.draw.choice((b"bomb", key.encode(), b"facts")) + b'": ' + inner + b", " + data.strip()[1:]


KINDS: list[tuple[str, Callable[[Mutator, Files], None]]] = [
    (name, function)
    for name, function in vars(Mutator).items()
    if callable(function) and not name.startswith(("_", "changed")) and name not in ("file", "change", "bomb")
]
KINDS_WEIGHT = {"flip": 60, "header_signed": 40, "manifest_signed": 60, "huge": 0.02}


def sign(files: Files, changed: Files) -> None:
    """Take changed files, and rewrite the manifest and COMMIT for them, as an adversary would."""
    manifest = json.loads(files["MANIFEST.json"])
    for name, data in changed.items():
        files[name] = data
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    resign(files, json.dumps(manifest).encode())


def resign(files: Files, manifest: bytes) -> None:
    files["MANIFEST.json"] = manifest
    files["COMMIT"] = hashlib.sha256(manifest).hexdigest().encode() + b"\n"


def put(files: Files, path: Path) -> None:
    path.mkdir()
    for name, found in files.items():
        data, kind = (found, "file") if isinstance(found, bytes) else (found[1], found[0])
        if kind == "file":
            (path / name).write_bytes(data)
        elif kind == "folder":
            (path / name).mkdir()
        elif kind == "pipe":
            os.mkfifo(path / name)
        else:
            aside = path.parent / f"aside-{name}"
            if kind == "link":
                aside.write_bytes(data)
            (path / name).symlink_to(aside)


def campaign(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Try so many mutations and return how many a loader accepted, or answered with another than CheckpointError.

    At every tenth the run's loader has to take the checkpoint before, and set the damaged one aside.
    """
    began = time.monotonic()
    pristine = {}
    for step in (STEP, OTHER):
        made = save(Checkpoints(folder / "pristine", QuickDisk()), step)
        pristine[step] = {inner.name: inner.read_bytes() for inner in made.path.iterdir()}
    mutate = Mutator(pristine[STEP], pristine[OTHER], random.Random(seed))
    accepted: Counter[str] = Counter()
    others: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for number in range(count):
        kind, files, name = mutate()
        kinds[kind] += 1
        run = folder / "run"
        run.mkdir()
        put(files, run / name)
        store = Checkpoints(run, QuickDisk())
        try:
            store.open(run / name)
        except CheckpointError as failure:
            if len(str(failure)) > 1000 or "\n" in str(failure):
                others[f"{kind}: {str(failure)[:200]}"] += 1
        except BaseException as failure:
            others[f"{kind}: {type(failure).__name__}: {str(failure)[:200]}"] += 1
        else:
            accepted[kind] += 1
        if number % 10 == 0:
            _fall_back(run, name, pristine[OTHER], others, kind)
        shutil.rmtree(run)
    return {
        "count": count,
        "accepted": sum(accepted.values()),
        "other_errors": sum(others.values()),
        "accepted_by_kind": dict(accepted),
        "others": dict(others.most_common(5)),
        "kinds": dict(kinds.most_common()),
        "seconds": round(time.monotonic() - began, 1),
    }


def _fall_back(run: Path, name: str, other: Files, others: Counter[str], kind: str) -> None:
    """Check what a run does that finds the damaged checkpoint: alone, and with a valid one beside it."""
    before = OTHER - 5 if name == f"step-{OTHER:08d}" else OTHER
    store = Checkpoints(run, QuickDisk())
    try:
        if store.newest() is not None:
            others[f"{kind}: a damaged one alone was taken"] += 1
    except NoCheckpointError:
        pass
    if before == OTHER:
        put(other, run / f"step-{OTHER:08d}")
        found = store.newest()
        older = int(name.removeprefix("step-")) < OTHER
        if found is None or found.step != OTHER or (run / name).exists() != older:
            others[f"{kind}: the one before was not taken"] += 1
