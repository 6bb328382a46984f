"""What the loop costs: distloop against a bare hand-written loop.

Both have the same model, data, order of samples, optimizer and logging.

    python benchmarks/loop_overhead.py            # all of it, a few minutes
    python benchmarks/loop_overhead.py --quick    # fewer rounds, to see whether it works

Each side of each row is a fresh process (two for two ranks); sides take turns, round after round, on the same machine.
A row's figure is the median over rounds of the ratio of neighbouring runs. Losses must be equal, or there is no figure.

Columns: CPU time per step (all threads, without start-up) and wall time per step, both as distloop over bare; start-up
is from process start to the end of the first step, as wall and as CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WARM_STEPS = 100  # left out of the time per step


@dataclass(frozen=True)
class Row:
    """A workload on a number of ranks."""

    workload: str
    ranks: int
    strategy: str
    steps: int
    log_every: int
    rounds: int


ROWS = [
    Row("tiny", 1, "ddp", 2000, 50, 7),
    Row("tiny", 2, "ddp", 1000, 50, 7),
    Row("tiny", 2, "naive", 1000, 50, 7),
    Row("medium", 1, "ddp", 30, 5, 3),
    Row("medium", 2, "ddp", 30, 5, 3),
]


# -- the workloads: each returns model, loss function, inputs, targets, samples per rank and step --------------------


def tiny() -> tuple[Any, Any, Any, Any, int]:
    """MLP 64-128-10 on digits, 32 samples per rank, so small that everything but the arithmetic shows."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    digits = load_digits()
    images = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return model, nn.CrossEntropyLoss(), images, labels, 32


def medium() -> tuple[Any, Any, Any, Any, int]:
    """A GPT of 6 layers, width 256, context 128, on random tokens, 4 samples per rank."""
    import torch
    from torch.nn import functional as F

    from distloop.tasks.gpt import GPT

    model = GPT(vocabulary=256, outputs=256, context=128, width=256, layers=6, heads=8)
    tokens = torch.randint(256, (512, 129), generator=torch.Generator().manual_seed(1))

    def loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())

    return model, loss, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 4


WORKLOADS = {"tiny": tiny, "medium": medium}


class Clock:
    """Notes time and CPU time when a step is logged."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float]] = []

    def note(self, step: int) -> None:
        self.points.append((step, time.time(), time.process_time()))

    def report(self, losses: list[float]) -> dict[str, Any]:
        born = float(os.environ["BENCH_BORN"])
        _, first_wall, first_cpu = self.points[0]
        # The medium workload is short: its first logged stretch is its warm-up.
        begin = next(p for p in self.points if p[0] >= min(WARM_STEPS, self.points[1][0]))
        end = self.points[-1]
        steps = end[0] - begin[0]
        return {
            "cpu": (end[2] - begin[2]) / steps,
            "wall": (end[1] - begin[1]) / steps,
            "start_wall": first_wall - born,
            "start_cpu": first_cpu,
            "losses": losses,
        }


def bare(row: Row, rank: int, directory: Path) -> dict[str, Any]:
    """The loop that people write by hand."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, TensorDataset

    if row.ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, criterion, inputs, targets, per_rank = WORKLOADS[row.workload]()
    net = DistributedDataParallel(model) if row.ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(TensorDataset(inputs, targets), batch_sampler=SameOrder(len(inputs), per_rank, rank, row.ranks))
    clock, logged, window, step = Clock(), [], [], 0
    log = (directory / "metrics.jsonl").open("w") if rank == 0 else None
    while step < row.steps:
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(net(x), y)
            loss.backward()
            optimizer.step()
            step += 1
            window.append(loss.detach() * (len(x) * row.ranks))
            if step == 1 or step % row.log_every == 0:
                # The tail of an epoch is smaller, so means are weighted: the same figure as distloop logs.
                sums = torch.stack(window).double() / loader.batch_sampler.sizes(step, len(window))
                if row.ranks > 1:
                    dist.all_reduce(sums)
                    sums /= row.ranks
                logged.append(float(sums.mean()))
                window.clear()
                if log is not None:
                    print(f"step {step}  loss {logged[-1]:.4f}")
                    log.write(json.dumps({"step": step, "loss": logged[-1], "lr": 0.05, "time": time.time()}) + "\n")
                clock.note(step)
            if step == row.steps:
                break
    if row.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    return clock.report(logged)


class SameOrder:
    """The batches that distloop makes, as lists of indices; epochs are cut so that ranks have equally many samples."""

    def __init__(self, samples: int, per_rank: int, rank: int, ranks: int):
        self.samples = samples - samples % (per_rank * ranks)
        self.per_rank, self.rank, self.ranks, self.epoch = per_rank, rank, ranks, 0

    def __len__(self) -> int:
        return self.samples // (self.per_rank * self.ranks)

    def __iter__(self) -> Any:
        import torch

        from distloop.data import derive_seed
        from distloop.order import Order

        permutation = Order(derive_seed("order", 0, self.epoch), self.samples)
        order, whole = permutation(torch.arange(self.samples)).tolist(), self.per_rank * self.ranks
        self.epoch += 1
        for start in range(self.rank * self.per_rank, self.samples, whole):
            yield order[start : start + self.per_rank]

    def sizes(self, step: int, steps: int) -> int:
        return self.per_rank * self.ranks


def with_distloop(row: Row, rank: int, directory: Path) -> dict[str, Any]:
    """The same by distloop, with its console output, metrics.jsonl and log file."""
    import torch
    from torch.utils.data import TensorDataset

    import distloop

    torch.manual_seed(0)
    model, criterion, inputs, targets, per_rank = WORKLOADS[row.workload]()
    whole = per_rank * row.ranks
    used = len(inputs) - len(inputs) % whole
    clock, logged = Clock(), []

    def note(record: distloop.Record) -> None:
        if record.kind == "train":
            logged.append(record.values["loss"])
            clock.note(record.step)

    distloop.fit(
        distloop.Supervised(model, criterion, TensorDataset(inputs[:used], targets[:used])),
        observers=[note],
        data={"global_batch_size": whole},
        optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.9},
        strategy={"name": row.strategy},
        train={"max_steps": row.steps},
        log={"every": row.log_every, "directory": str(directory), "tensorboard": False, "picture": False},
    )
    return clock.report(logged) if rank == 0 else {}


SIDES = {"bare": bare, "distloop": with_distloop}


# -- the harness -----------------------------------------------------------------------------------------------------


def child(side: str, row: Row) -> None:
    rank, directory = int(os.environ.get("RANK", "0")), Path(os.environ["BENCH_DIRECTORY"])
    result = SIDES[side](row, rank, directory)
    if rank == 0:
        (directory / "bench.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # with gloo, torch now and then aborts in the interpreter's end, on either side


def run(side: str, row: Row) -> dict[str, Any]:
    """Run one side once, in processes of its own."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        ranks = []
        for rank in range(row.ranks):
            env = os.environ | {"OMP_NUM_THREADS": "1", "BENCH_DIRECTORY": directory, "GLOO_SOCKET_IFNAME": "lo"}
            if row.ranks > 1:
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
                env |= {"WORLD_SIZE": str(row.ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(row.ranks)}
            env["BENCH_BORN"] = str(time.time())
            command = [
                sys.executable,
                str(HERE / "loop_overhead.py"),
                "--child",
                side,
                "--row",
                json.dumps(asdict(row)),
            ]
            ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL))
        codes = [process.wait(timeout=600) for process in ranks]
        if any(codes):
            raise SystemExit(f"{side} failed on {row}: exit codes {codes}")
        return dict(json.loads((Path(directory) / "bench.json").read_text()))


def measure(row: Row) -> dict[str, Any]:
    """Return the medians of both sides and of their ratios."""
    runs: list[dict[str, dict[str, Any]]] = []
    for number in range(row.rounds):
        order = ["bare", "distloop"] if number % 2 == 0 else ["distloop", "bare"]
        runs.append({side: run(side, row) for side in order})
        ours, theirs = (runs[-1][side]["losses"] for side in ("distloop", "bare"))
        worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        if worst > 1e-3:
            raise SystemExit(f"{row}: the sides did not train the same: losses differ by {worst:.1e}")
    result: dict[str, Any] = {"row": asdict(row), "loss_difference": worst}
    for key in ("cpu", "wall", "start_cpu", "start_wall"):
        ratios = [r["distloop"][key] / r["bare"][key] for r in runs]
        result[key] = {side: statistics.median(r[side][key] for r in runs) for side in SIDES}
        result[key] |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as the table that the documents quote."""
    lines = [
        "| workload | ranks | strategy | bare, ms CPU/step | distloop, ms CPU/step | CPU ratio (least-most) "
        "| wall ratio | start-up, CPU ratio | start-up, wall ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        row, cpu = r["row"], r["cpu"]
        strategy = row["strategy"] if row["ranks"] > 1 else "-"
        lines.append(
            f"| {row['workload']} | {row['ranks']} | {strategy} "
            f"| {1e3 * cpu['bare']:.3f} | {1e3 * cpu['distloop']:.3f} "
            f"| **{cpu['ratio']:.2f}** ({cpu['least']:.2f}-{cpu['most']:.2f}) | {r['wall']['ratio']:.2f} "
            f"| {r['start_cpu']['ratio']:.2f} | {r['start_wall']['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of each row")
    parser.add_argument("--only", help="rows of this workload only")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "loop_overhead.json", help="where to write")
    parser.add_argument("--child", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, Row(**json.loads(options.row)))
        return
    results = []
    for row in ROWS:
        if options.only in (None, row.workload):
            rounds = 1 if options.quick else row.rounds
            results.append(measure(Row(**(asdict(row) | {"rounds": rounds}))))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{table(results)}\n\nwritten to {options.json}")


if __name__ == "__main__":
    main()
