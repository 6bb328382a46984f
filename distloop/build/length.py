"""How long a run will be, as far as that can be told before it begins."""

from __future__ import annotations

from distloop.config import Config


def epochs_of(config: Config) -> int | None:
    """Return the limit on epochs, which is 10 where nothing else ends the run."""
    train = config.train
    unlimited = train.epochs is None and train.max_steps is None and train.max_seconds is None
    return 10 if unlimited else train.epochs


def steps_of(config: Config, per_epoch: int | None) -> int | None:
    """Return how many updates a run will make whose epochs have so many (None: nobody knows), if that can be told."""
    epochs = epochs_of(config)
    by_epochs = per_epoch * epochs if per_epoch is not None and epochs is not None else None
    known = [n for n in (by_epochs, config.train.max_steps) if n is not None]
    return min(known) if known else None
