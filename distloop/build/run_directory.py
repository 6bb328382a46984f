"""The directory of a run: found or made, one job at a time in it, with the checkpoint to go on from."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from distloop.build import attempts
from distloop.build.method import as_read
from distloop.checkpoints import Checkpoint, Checkpoints, RunLock
from distloop.config import Config
from distloop.errors import CheckpointError, ConfigError, DistloopError, StorageError, by_exit_code
from distloop.keeper import PINNED
from distloop.messages import gather_json
from distloop.settings import Resolved
from distloop.transports import Transport
from distloop.world import World

CHECKPOINTS = "checkpoints"
UNFINISHED = (f"{PINNED}*", ".probe-*", ".*.partial")  # files that an attempt which was killed may leave
AUTO = "auto"


@dataclass
class RunDirectory:
    """Where a run keeps its files; on rank 0 it holds the lock until it is closed."""

    path: Path
    run_id: str
    token: str  # of this attempt, the same on all ranks
    checkpoint: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)
    lock: RunLock | None = None

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path / CHECKPOINTS)

    def close(self) -> None:
        """Let the next job in."""
        if self.lock is not None:
            self.lock.release()


def find(config: Config, world: World, transport: Transport) -> RunDirectory | None:
    """Return the directory of the run that is to be gone on with, if there is one; every rank calls it.

    Rank 0 takes its lock, removes what dead attempts left, and verifies; the others open what it has found.

    Raises:
        ConfigError: there is no run at the path.
        BusyError: another job works there.
        NoCheckpointError: it has checkpoints, and none of them is valid.
    """
    found, said = None, None
    if world.rank == 0:
        attempts.begin()
        found, said = _said(lambda: _find(config, world))
    return _told(found, said, transport)


def make(config: Config, world: World, transport: Transport) -> RunDirectory:
    """Make a run directory on rank 0, never that of an earlier run, and tell the others its name.

    Raises:
        StorageError: it cannot be made, or not written into.
    """
    found, said = None, None
    if world.rank == 0:
        found, said = _said(lambda: _make(config, world))
    made = _told(found, said, transport)
    assert made is not None
    return made


def write_configuration(directory: Path, resolved: Resolved) -> None:
    """Leave the resolved configuration beside the results, in a form that can be run again."""
    from ruamel.yaml import YAML

    values = as_read(resolved)
    values["checkpoint"].pop("resume")  # how this attempt began is not how the next one does
    partial = directory / ".config.yaml.partial"
    try:
        with partial.open("w", encoding="utf-8") as file:
            YAML(typ="safe", pure=True).dump(values, file)
        partial.replace(directory / "config.yaml")
    except OSError as failure:
        raise StorageError(f"{directory / 'config.yaml'}: cannot be written: {failure.strerror}") from failure


def _said(work: Any) -> tuple[RunDirectory | None, Any]:
    """Return what ``work`` finds, and what the other ranks are told of it."""
    try:
        found: RunDirectory | None = work()
    except DistloopError as failure:
        return None, {"failure": str(failure), "exit_code": failure.exit_code}
    if found is None:
        return None, None
    checkpoint = None if found.checkpoint is None else str(found.checkpoint.path)
    own = {"path": str(found.path), "run_id": found.run_id, "token": found.token, "checkpoint": checkpoint}
    own["digest"] = None if found.checkpoint is None else found.checkpoint.digest
    return found, own


def _told(found: RunDirectory | None, said: Any, transport: Transport) -> RunDirectory | None:
    """Return on every rank what rank 0 has found, or raise what it could not do."""
    told = gather_json(transport, said)[0]
    if told is None:
        return None
    if "failure" in told:
        raise by_exit_code(told["exit_code"])(told["failure"], everywhere=True)
    if found is None:
        path = Path(told["path"])
        found = RunDirectory(path, told["run_id"], told["token"])
    seen = gather_json(transport, found.path.is_dir())
    if not all(seen):
        raise StorageError(
            f"{found.path}: is there on rank 0 and not on rank {seen.index(False)}: ranks of several hosts need a file "
            "system that all of them see",
            everywhere=True,
        )
    if told["checkpoint"] is not None and found.checkpoint is None:
        found.checkpoint = found.checkpoints.open(Path(told["checkpoint"]), contents=False)
        if found.checkpoint.digest != told["digest"]:
            raise CheckpointError(f"{told['checkpoint']}: rank {transport.rank} sees another one there than rank 0")
    return found


def _find(config: Config, world: World) -> RunDirectory | None:
    resume = config.checkpoint.resume
    if (path := attempts.earlier(config, world)) is not None:
        return _enter(path, None, world)  # whatever its first attempt was told to begin with
    if resume is None:
        return None
    if resume == AUTO:
        if config.log.name is None:
            raise ConfigError("checkpoint.resume: auto finds a run by its name: set log.name, or give the run's path")
        path = Path(config.log.directory, config.log.name)
        if not path.exists():
            return None
    else:
        path = Path(resume)
        if not path.is_dir():
            raise ConfigError(f"checkpoint.resume: {path}: there is no such directory (auto, or the path of a run)")
    chosen = path if path.name.startswith("step-") and path.parent.name == CHECKPOINTS else None
    run = path.parent.parent if chosen is not None else path
    if resume != AUTO and not (run / CHECKPOINTS).is_dir():
        raise ConfigError(f"checkpoint.resume: {run}: is no run with checkpoints")
    return _enter(run, chosen, world)


def _enter(path: Path, chosen: Path | None, world: World) -> RunDirectory:
    """Take an earlier run's directory, and find what to go on from."""
    lock = RunLock(path, job=_job())
    try:
        known = attempts.known_of(path)
        found = RunDirectory(path, known.get("run_id") or secrets.token_hex(8), _token(), lock=lock)
        found.notes += [lock.note] if lock.note else []
        checkpoints = found.checkpoints
        checkpoints.clean()
        _clean(path)
        found.checkpoint = checkpoints.newest() if chosen is None else checkpoints.open(chosen)
        found.notes += [f"damaged, set aside: {reason}" for _, reason in checkpoints.damaged]
        _probe(path)
        if chosen is not None:
            found.notes += _set_newer_aside(checkpoints, found)
        if found.checkpoint is None:
            found.notes += _begin_anew(path)
        attempts.note(
            path, known, found.run_id, found.token, None if found.checkpoint is None else found.checkpoint.step, world
        )
    except BaseException:
        lock.release()
        raise
    return found


def _clean(path: Path) -> None:
    """Remove what attempts that are dead have left beside the checkpoints."""
    for left in (left for pattern in UNFINISHED for left in path.glob(pattern)):
        with suppress(OSError):  # it takes room, and does no other harm
            left.unlink()


def _set_newer_aside(checkpoints: Checkpoints, found: RunDirectory) -> list[str]:
    """Put away the checkpoints that follow the chosen one: the run will come by their steps again."""
    assert found.checkpoint is not None
    newer = [step for step in checkpoints.steps() if step > found.checkpoint.step]
    for step in newer:
        checkpoints.set_aside(step, f"the run was resumed from step {found.checkpoint.step}")
    return [f"checkpoints of later steps are in quarantine/: {', '.join(map(str, newer))}"] if newer else []


def _begin_anew(path: Path) -> list[str]:
    """Put aside what an attempt without a checkpoint has left; refuse to write over a run that came to its end."""
    if (path / "result.json").exists():
        raise ConfigError(
            f"checkpoint.resume: {path}: this run has ended, and has no checkpoint to go on from: take another log.name"
        )
    kept = []
    for old in (path / "metrics.jsonl", *path.glob("logs/rank_*.log")):
        if old.exists():
            old.replace(old.with_name(f"{old.stem}.before{old.suffix}"))
            kept.append(old.name)
    (path / "logs").mkdir(exist_ok=True)
    return [f"there is no checkpoint yet; what was logged is kept as {kept[0]}, with .before"] if kept else []


def _make(config: Config, world: World) -> RunDirectory:
    name = config.log.name or f"{config.task.name.rpartition(':')[2]}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = Path(config.log.directory, name), 1
    try:
        while path.exists():
            number += 1
            path = Path(config.log.directory, f"{name}-{number}")
        (path / "logs").mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"log.directory: {path} cannot be made: {error.strerror}") from error
    lock = RunLock(path, job=_job())
    try:
        found = RunDirectory(path, secrets.token_hex(8), _token(), lock=lock, notes=[lock.note] if lock.note else [])
        _probe(path)
        attempts.note(path, {}, found.run_id, found.token, None, world)
    except BaseException:
        lock.release()
        raise
    return found


def _probe(path: Path) -> None:
    """Do once what saving does, so that a disk that refuses is known now and not after hours.

    Raises:
        StorageError: it does refuse.
    """
    probe = path / f".probe-{secrets.token_hex(4)}"
    try:
        with probe.open("xb") as file:
            file.write(b"distloop")
            file.flush()
            os.fsync(file.fileno())
        renamed = probe.rename(probe.with_suffix(".renamed"))
        renamed.unlink()
    except OSError as failure:
        raise StorageError(f"{path}: cannot be written into: {failure.strerror}") from failure


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def _token() -> str:
    return secrets.token_hex(4)
