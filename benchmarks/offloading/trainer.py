"""One rank of a training whose time and memory are measured; benchmarks/offload.py starts it.

    python benchmarks/offloading/trainer.py '{"side": "zero_offload", "model": "gpt", ...}' FOLDER

Every rank leaves a file RANK.json in FOLDER: seconds of each step, and its memory at several points, in bytes. Memory
is the proportional set size, in which what ranks share counts once over all of them; that of ``host_memory`` (masters,
optimizer state, gradients that wait) is read from the mappings that hold it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

APART = "zero_offload apart"  # from an emulated device: nothing that is on the host is the model's memory too
APART_BF16 = APART + ", bf16 between ranks"
STRETCHES: list[tuple[int, int]] = []  # of huge pages: where, and how many bytes


def main() -> None:
    wanted, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _note_stretches()
    make = _deepspeed if wanted["side"] == "deepspeed" else _distloop
    ready = make(wanted, size)
    before = pss()
    memory = Memory()
    torch.manual_seed(0)
    model = _model(wanted)
    step, finish = ready(model)
    seconds = []
    generator = torch.Generator().manual_seed(rank)
    for _ in range(wanted["steps"]):
        batch = _batch(wanted, generator)
        begin = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - begin)
    settled, host = pss(), in_stretches()
    peak = memory.stop()
    parameters = sum(p.numel() for p in model.parameters())
    told = {"seconds": seconds, "before": before, "settled": settled, "peak": peak, "host": host}
    (folder / f"{rank}.json").write_text(json.dumps(told | {"parameters": parameters}))
    finish()


# -- sides -----------------------------------------------------------------------------------------------------------

Ready = Callable[[nn.Module], tuple[Callable[[Any], None], Callable[[], None]]]


def _distloop(wanted: dict[str, Any], size: int) -> Ready:
    from distloop.strategies import Options, Strategy, make
    from distloop.strategies.zero_offload import ZeroOffload
    from distloop.transports import Alone
    from distloop.transports.join import join
    from distloop.world import World
    from offloading.device import Clock, EmulatedLink
    from offloading.training import learner_of, train

    rank = int(os.environ["RANK"])
    world = World(rank, size, rank, size, "benchmark")
    by_torch = wanted["side"] == "ddp"
    transport = join(world, "auto", timeout=60.0, torch_collects=by_torch)[0] if size > 1 else Alone()

    def ready(model: nn.Module) -> Any:
        weights = torch.bfloat16 if wanted["half"] else None
        options = Options(weights=weights, calibration="cached")
        parameters = dict(model.named_parameters())
        if wanted["side"].startswith(APART):
            options = replace(options, wire_dtype="bf16" if wanted["side"] == APART_BF16 else "fp32")
            strategy: Strategy = ZeroOffload(parameters, transport, options, EmulatedLink(Clock(), 4e9))
        else:
            strategy = make(wanted["side"], parameters, transport, options)
        learner = learner_of(model, strategy, clip=1.0 if wanted["clip"] else None)

        def step(batch: Tensor) -> None:
            train(learner, batch, 1.0 / size)

        def finish() -> None:
            strategy.finish()
            transport.close()

        return step, finish

    return ready


def _deepspeed(wanted: dict[str, Any], size: int) -> Ready:
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile, and not use
    deepspeed.init_distributed("gloo")
    configuration = {
        "train_micro_batch_size_per_gpu": wanted["batch"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0 if wanted["clip"] else 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.01}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": bool(wanted["half"])},
    }

    def ready(model: nn.Module) -> Any:
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=configuration)[0]

        def step(batch: Any) -> None:
            engine.backward(engine(batch))
            engine.step()

        return step, dist.destroy_process_group

    return ready


# -- models ----------------------------------------------------------------------------------------------------------


class _Tower(nn.Module):
    """Parameters of two dimensions, and little to compute."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.layers[0].weight.dtype)
        for layer in self.layers:
            x = x + layer(x)
        return x.float().square().mean()


class _Language(nn.Module):
    """A GPT with its loss."""

    def __init__(self, wanted: dict[str, Any]):
        super().__init__()
        from distloop.tasks.gpt import GPT

        sizes = {name: wanted[name] for name in ("context", "width", "layers")}
        self.gpt = GPT(vocabulary=256, outputs=256, heads=8, **sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        guesses = self.gpt(tokens[:, :-1])
        return nn.functional.cross_entropy(guesses.flatten(0, 1), tokens[:, 1:].flatten())


def _model(wanted: dict[str, Any]) -> nn.Module:
    return _Tower(wanted["width"], wanted["layers"]) if wanted["model"] == "tower" else _Language(wanted)


def _batch(wanted: dict[str, Any], generator: torch.Generator) -> Tensor:
    if wanted["model"] == "tower":
        return torch.randn(wanted["batch"], wanted["width"], generator=generator)
    return torch.randint(256, (wanted["batch"], wanted["context"] + 1), generator=generator)


# -- memory ----------------------------------------------------------------------------------------------------------


def pss() -> int:
    """Return this process's memory in bytes; of what it shares with others its part."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel tells no proportional set size")


def in_stretches() -> int:
    """Return how many bytes of the stretches that ``host_memory`` has made are there."""
    ranges = [(begin, begin + size) for begin, size in STRETCHES]
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            start, stop = (int(part, 16) for part in head.split("-"))
            inside = any(start < last and first < stop for first, last in ranges)
        elif inside and head == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


def _note_stretches() -> None:
    """Have every stretch of huge pages noted."""
    from distloop import host_memory

    original = host_memory._Stretch.__init__

    def noted(self: Any, size: int) -> None:
        original(self, size)
        STRETCHES.append((self.address, size))  # without what is around it, which may be one mapping with other memory

    host_memory._Stretch.__init__ = noted


class Memory:
    """Looks at this process's memory again and again, for the most that it had."""

    def __init__(self) -> None:
        self._most, self._ends = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._ends.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while not self._ends.wait(0.02):
            self._most = max(self._most, pss())


if __name__ == "__main__":
    main()
