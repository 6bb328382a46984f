"""Draw docs/images/offload.png: what the accelerator, the link and Adam did in two steps, as it was measured.

python benchmarks/offloading/picture.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import matplotlib as mpl  # noqa: E402
import torch  # noqa: E402
from offloading.timing import ADAM, LAYERS, OPTIONS, PARAMETERS, Side  # noqa: E402

from distloop.observers.curves import new_figure  # noqa: E402
from distloop.strategies import Options  # noqa: E402
from distloop.strategies.zero_offload import ZeroOffload  # noqa: E402
from distloop.transports import Alone  # noqa: E402

IMAGE = HERE.parent.parent / "docs" / "images" / "offload.png"
LANES = ["device: forward, backward", "gradients down", "host: Adam", "values up"]
ACCELERATOR, LINK = 2.0, 0.5  # of Adam's time
Bar = tuple[int, float, float, float]  # lane, begin, end, and where in the model, from 0 to 1


class Trace:
    """Notes what a side does, and when."""

    def __init__(self, side: Side):
        self.bars: list[Bar] = []
        self._side, self._worked = side, 0
        self._copies: list[tuple[int, Any, float, float]] = []
        strategy = side.strategy
        self._bucket = {bucket.own.data_ptr(): i for i, bucket in enumerate(strategy.buckets)}
        self._shard = {id(shard): i for i, shard in enumerate(side.learner.parameters)}
        clock, optimizer = side.accelerator.clock, side.learner.optimizer
        self._work, self._apply = clock.work, optimizer.apply
        clock.work, optimizer.apply = self._on_work, self._on_apply  # type: ignore[method-assign]
        for lane, engine in ((1, side.link.down_engine), (3, side.link.up_engine)):
            self._watch(lane, engine)

    def all(self) -> list[Bar]:
        copies = [(lane, copy.ends_at - seconds, copy.ends_at, place) for lane, copy, seconds, place in self._copies]
        return self.bars + copies

    def _on_work(self, seconds: float) -> None:
        self._work(seconds)
        end = self._side.accelerator.clock.free_at
        number = self._worked % (2 * LAYERS)  # forward goes up, backward comes down
        self._worked += 1
        self.bars.append((0, end - seconds, end, min(number, 2 * LAYERS - 1 - number) / LAYERS))

    def _on_apply(self, collected: Any, shard: Any) -> None:
        begin = time.perf_counter()
        self._apply(collected, shard)
        self.bars.append((2, begin, time.perf_counter(), self._place(self._shard[id(shard)])))

    def _watch(self, lane: int, engine: Any) -> None:
        submit, sent = engine.submit, [0]

        def noted(copy: Any) -> Any:
            bucket = self._bucket[copy.to.data_ptr()] if lane == 3 else sent[0] % len(self._bucket)
            sent[0] += 1
            self._copies.append((lane, copy, copy.source.nbytes / engine.rate, self._place(bucket)))
            return submit(copy)

        engine.submit = noted

    def _place(self, bucket: int) -> float:
        return 1 - bucket / len(self._bucket)  # the first bucket holds the last layer


def traced(*, clip: bool) -> tuple[list[Bar], list[float]]:
    """Return what happened in some steps, and when each began."""
    options = Options(**OPTIONS)  # type: ignore[arg-type]
    side = Side("ours", lambda p, link: ZeroOffload(p, Alone(), options, link), clip=clip)
    side.accelerator.set_seconds(ACCELERATOR * ADAM)
    side.link.set_rate(2 * PARAMETERS / (LINK * ADAM))
    side.train(2)
    trace = Trace(side)
    begins = side.train(4)
    side.strategy.close()
    return trace.all(), begins


def draw() -> Any:
    torch.set_num_threads(1)
    figure = new_figure(9.0, 4.6)
    panels = figure.subplots(2, 1, sharex=True)
    colours = mpl.colormaps["viridis"]
    for axes, clip in zip(panels, (False, True), strict=True):
        bars, begins = traced(clip=clip)
        first, last = begins[1], begins[3]
        for lane, begin, end, place in bars:
            if begin < last and end > first:
                left, right = max(begin, first) - first, min(end, last) - first
                axes.barh(lane, 1e3 * (right - left), left=1e3 * left, height=0.8, color=colours(place), linewidth=0)
        axes.axvline(1e3 * (begins[2] - first), color="0.3", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(LANES)), LANES)
        axes.invert_yaxis()
        text = (
            "clipping by the norm: updates begin when the last gradient is there" if clip else "applied as they arrive"
        )
        axes.set_title(f"{text}; step {1e3 * (last - first) / 2:.0f} ms", loc="left", fontsize=9)
        axes.set_xlim(0, 1e3 * (last - first))
    panels[1].set_xlabel("ms (two steps; dark: first layers, light: last layers)")
    return figure


if __name__ == "__main__":
    draw().savefig(IMAGE, dpi=130)
    print(f"drawn: {IMAGE.relative_to(HERE.parent.parent)}")
