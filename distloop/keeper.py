"""What a run's checkpoint holds, beside what files can tell: how it is gathered on all ranks, and put back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distloop import recording
from distloop.checkpoint import distinct, model_state, prefixes_of
from distloop.checkpoints import Checkpoint, Stored
from distloop.data import derive_seed
from distloop.errors import CheckpointError, ConfigError, DistloopError
from distloop.own_state import generators, pack, set_generators
from distloop.resumed import OwnStates, Resumed
from distloop.saver import MODEL, Contents, Saved, Saver
from distloop.transports import Transport
from distloop.turns import Turns
from distloop.world import World

PINNED = ".best-"  # begins the names of files that a checkpoint which is being written will link
MOST_MISSES = 3  # checkpoints in a row that could not be written, before the run ends


class Stateful(Protocol):
    """Something with a state in JSON's types that is the same on all ranks; both may talk to the other ranks."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class OwnState(Protocol):
    """Something of which each rank has a state of its own: tensors and JSON's types, nested."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_states(self, states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        """Go on from the states of all ranks of then, as one of ``ranks`` now; there may be more or fewer."""


@dataclass
class Keeper:
    """Saves a run, and sets one back to where it was.

    Args:
        saver: writes.
        turns: the learners.
        world, transport, device: this rank's.
        directory: of the run, where the best model is.
        files: the model files that the run keeps there, by name.
        seed: of random numbers that are new on resuming.
        shared: states that are the same on all ranks, by name.
        own: states of which each rank has its own, by name.
        described: what later attempts are compared with (configuration, data), in JSON's types.
        facts: for people, in the manifest.
        grace: seconds between a signal and the end, in which a save should fit.
    """

    saver: Saver
    turns: Turns
    world: World
    transport: Transport
    device: torch.device
    directory: Path
    files: Mapping[str, Mapping[str, nn.Module]]
    seed: int
    shared: dict[str, Stateful]
    own: dict[str, OwnState]
    described: Callable[[], Mapping[str, Any]]
    facts: Mapping[str, Any]
    grace: float = 30.0
    misses: int = field(default=0, init=False)
    _warned: bool = field(default=False, init=False)

    def rehearse(self) -> None:
        """Take everything once and throw it away, so that a mistake is known before there is something to lose."""
        with ExitStack() as stack:
            for learner in self.turns.learners:
                stack.enter_context(learner.strategy.still())
            for learner in self.turns.learners:
                recording.record(learner, self.world.rank, self.world.size)
        pack("own", {name: part.state_dict() for name, part in self.own.items()})

    def save(self, step: int, best: int | None) -> None:
        """Take everything as it is now, and begin to write it; every rank calls it after the same step.

        Args:
            step: global batches done.
            best: the step of the best model, if there is one in the run's directory.
        """
        rank, ranks, learners = self.world.rank, self.world.size, self.turns.learners
        state = {"step": step, **{name: part.state_dict() for name, part in self.shared.items()}}
        own: dict[str, Any] = {name: part.state_dict() for name, part in self.own.items()}
        own["generators"] = generators(self.device)
        contents = Contents({}, best=best)
        with ExitStack() as stack:
            for learner in learners:
                stack.enter_context(learner.strategy.still())
            recorded = {learner.name: recording.record(learner, rank, ranks) for learner in learners}
            buffers = self._buffers()
            own["buffers"] = {"names": list(buffers), "values": list(buffers.values())}
            if rank == 0:
                self._take_models(contents)
            self._restore_buffers(buffers)
        optimizer = [tensor for one in recorded.values() for tensor in one.tensors]
        packed, tensors = pack(f"rank-{rank:05}", own)
        contents.files |= {f"optim-{rank:05}.safetensors": optimizer, f"rank-{rank:05}.safetensors": tensors}
        contents.files = {name: tensors for name, tensors in contents.files.items() if tensors}
        numbers = {name: one.numbers for name, one in recorded.items() if one.numbers}
        contents.own = {"state": packed, "numbers": numbers}
        if rank == 0:
            contents.links = self._pinned(step) if best is not None else {}
            contents.facts = {**self.facts, "ranks": ranks}
            contents.state = {
                **state,
                "learners": {learner.name: learner.state_dict() for learner in learners},
                "structure": {one.name: recording.structure(one.objective.model) for one in learners},
                "turns": self.turns.batches,
                "described": self.described(),
            }
        self.saver.save(step, contents)

    def _take_models(self, contents: Contents) -> None:
        """Take the models as they are, and what objectives have beside them."""
        models = {learner.name: learner.objective.model for learner in self.turns.learners}
        stored, tied = distinct(model_state(models))
        contents.files[MODEL] = [Stored(key, tensor) for key, tensor in stored.items()]
        contents.metadata[MODEL] = {"format": "pt", **tied}
        prefix = prefixes_of(models)
        contents.trained = {prefix[one.name] + key for one in self.turns.learners for key in one.strategy.parameters}
        learned = list(models.values())
        contents.files["extra.safetensors"] = [
            tensor for learner in self.turns.learners for tensor in recording.record_others(learner, learned)
        ]

    def restore(self, resumed: Resumed) -> None:
        """Set models, optimizers and everything else to what a checkpoint says; every rank calls it.

        Raises:
            ConfigError: it is of another model or task.
            CheckpointError: it lacks something.
        """
        checkpoint, state = resumed.checkpoint, resumed.checkpoint.state
        learners = self.turns.learners
        with _ours(checkpoint):
            self._check_structure(checkpoint)
            learned = [learner.objective.model for learner in learners]
            prefixes = prefixes_of([learner.name for learner in learners])
            for learner in learners:
                learner.load_state_dict(state["learners"][learner.name])
                numbers: dict[str, Any] = {}
                for rank in state["ranks"]:
                    numbers |= rank["numbers"].get(learner.name, {})
                recording.restore(learner, checkpoint, numbers, learned, prefixes[learner.name])
            self.turns.batches = state["turns"]
            for name, part in self.shared.items():
                part.load_state_dict(state[name])
        for name, own in self.own.items():
            states = OwnStates(checkpoint, name)
            with _ours(checkpoint):
                states[0]  # it is there; what its owner makes of it is the owner's business
            own.load_states(states, self.world.rank, self.world.size)
        if self.world.rank == 0:
            self._restore_best(checkpoint)

    def has_best(self, resumed: Resumed) -> bool:
        """Return whether a checkpoint has the best model of then, and not only what it was worth."""
        return any(_kept_best(name) in resumed.checkpoint.manifest["files"] for name in self.files)

    def restore_random(self, resumed: Resumed) -> None:
        """Set what draws random numbers, and buffers that ranks have of their own; the last thing before training."""
        rank, ranks = self.world.rank, self.world.size
        if resumed.ranks == ranks:
            set_generators(OwnStates(resumed.checkpoint, "generators")[rank], self.device)
            buffers = OwnStates(resumed.checkpoint, "buffers")[rank]
            self._restore_buffers(dict(zip(buffers["names"], buffers["values"], strict=True)))
        else:
            torch.manual_seed(derive_seed("resumed", self.seed, resumed.checkpoint.step, rank))

    def take(self) -> Iterator[Saved]:
        """Yield how saves have ended, on rank 0; count those that failed in a row."""
        for saved in self.saver.take():
            self.misses = self.misses + 1 if saved.failure is not None else 0
            yield saved

    def too_slow(self, saved: Saved) -> str | None:
        """Return a warning, once, if a save takes longer than there is time after a signal."""
        if self._warned or saved.failure is not None or saved.seconds <= self.grace:
            return None
        self._warned = True
        return (
            f"a checkpoint takes {saved.seconds:.0f} s, and checkpoint.grace says that a run is killed "
            f"{self.grace:g} s after a signal: have the signal sent earlier, or the grace made longer"
        )

    def _buffers(self) -> dict[str, Tensor]:
        """Make buffers equal on all ranks, as in an evaluation; return this rank's own where they differed."""
        before = {key: buffer.clone() for key, buffer in self._all_buffers().items()} if self.world.size > 1 else {}
        if before:
            for learner in self.turns.learners:
                learner.average_statistics(self.transport)
        now = self._all_buffers()
        return {key: own for key, own in before.items() if not torch.equal(own, now[key])}

    @torch.no_grad()
    def _restore_buffers(self, own: Mapping[str, Tensor]) -> None:
        every = self._all_buffers()
        for key, value in own.items():
            every[key].copy_(value)

    def _all_buffers(self) -> dict[str, Tensor]:
        learners = self.turns.learners
        return {f"{one.name}/{k}": b for one in learners for k, b in one.buffers().items()}

    def _pinned(self, step: int) -> dict[str, Path]:
        """Return the best model's files under names that stay as they are, whatever becomes better meanwhile."""
        found = {}
        for name in self.files:
            source, pinned = self.directory / name, self.directory / f"{PINNED}{step:08}-{name}"
            try:
                pinned.unlink(missing_ok=True)
                try:
                    os.link(source, pinned)
                except OSError:  # a file system without links
                    shutil.copyfile(source, pinned)
                found[_kept_best(name)] = pinned
            except OSError as failure:
                self.saver.miss(step, f"{source}: cannot be kept: {failure.strerror}")
        return found

    def _restore_best(self, checkpoint: Checkpoint) -> None:
        """Put the best model of then back to where the run keeps it."""
        for name in self.files:
            source, target = checkpoint.path / _kept_best(name), self.directory / name
            if source.exists():
                partial = target.with_name(f".{name}.partial")
                shutil.copyfile(source, partial)
                partial.replace(target)

    def _check_structure(self, checkpoint: Checkpoint) -> None:
        known = checkpoint.state["structure"]
        for learner in self.turns.learners:
            if learner.name not in known:
                names = ", ".join(known)
                raise ConfigError(f"{checkpoint.path}: has learners {names}, and the task has {learner.name!r}")
            here, there = recording.structure(learner.objective.model), known[learner.name]
            if here != there:
                raise ConfigError(
                    f"{checkpoint.path}: learner {learner.name!r}: the modules of its {there['kind']} are not those of "
                    f"the {here['kind']} here, though tensors may fit: the model has changed"
                )


@contextmanager
def _ours(checkpoint: Checkpoint) -> Iterator[None]:
    """Say that a checkpoint lacks something, where it is read by those who wrote it."""
    try:
        yield
    except DistloopError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as failure:
        reason = f"{type(failure).__name__}: {failure}"
        raise CheckpointError(f"{checkpoint.path}: is not what this version of distloop writes ({reason})") from failure


def _kept_best(name: str) -> str:
    """Return how a checkpoint names the best model's file: not as tensors of its own, which would be there twice."""
    return f"best-{Path(name).stem}"
