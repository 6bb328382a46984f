"""Every kind of learning by its supplied configuration, each against the figure that it must reach.

    python benchmarks/kinds.py                      # all of them on 2 ranks, about ten minutes
    python benchmarks/kinds.py dqn dyna --ranks 4   # some
    python benchmarks/kinds.py --strategy naive --seed 1
    python benchmarks/kinds.py --keep FOLDER        # and leave the runs, with their pictures, in FOLDER

Each run is one torchrun of ``distloop train configs/NAME.yaml``; the figure is that of the model that was kept. If
nothing is asked for, benchmarks/results/kinds.json is written, which docs/kinds.md quotes. Ends with 1 if a figure is
missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 1800  # seconds for one run


@dataclass(frozen=True)
class Must:
    """What a kind's metric must reach: a number, or another metric of the same evaluation."""

    metric: str
    higher: bool
    bound: float | str
    factor: float = 1.0  # on the bound

    def of(self, metrics: Mapping[str, float]) -> float:
        """Return the bound as a number."""
        return self.factor * (metrics[self.bound] if isinstance(self.bound, str) else self.bound)

    def reached(self, metrics: Mapping[str, float]) -> bool:
        value, bound = metrics[self.metric], self.of(metrics)
        return value >= bound if self.higher else value <= bound

    def words(self, metrics: Mapping[str, float]) -> str:
        """Return the bound as people write it."""
        text = f"{'at least' if self.higher else 'at most'} {self.of(metrics):.4g}"
        if not isinstance(self.bound, str):
            return text
        return f"{text} ({'' if self.factor == 1.0 else f'{self.factor:g} x '}{self.bound})"


KINDS: dict[str, list[Must]] = {
    "masked_lm": [Must("bits_per_byte", False, "unigram/bits_per_byte", 0.75)],
    "autoencoder": [Must("loss", False, "pca/loss")],
    "gan": [Must("score", True, 7.0), Must("confidence", True, 0.9), Must("classes", True, 10.0)],
    "contrastive": [Must("neighbour_accuracy", True, "pixels/neighbour_accuracy")],
    "dqn": [Must("return", True, 400.0)],
    "actor_critic": [Must("return", True, 400.0)],
    "dyna": [Must("return", True, 400.0)],
    "modem": [Must("gap_db", False, 0.5)],
}


def run(kind: str, ranks: int, strategy: str, seed: int, keep: str | None) -> dict[str, Any]:
    """Train one configuration; return what it came to."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or temporary
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "distloop", "train", str(ROOT / "configs" / f"{kind}.yaml"), "--world.device", "cpu"]
        command += ["--log.directory", folder, "--log.name", kind, "--log.picture", str(keep is not None).lower()]
        command += ["--strategy.name", strategy, "--train.seed", str(seed)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=LIMIT)
        if ended.returncode:
            raise SystemExit(f"{kind} ended with {ended.returncode}:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        result = json.loads((Path(folder) / kind / "result.json").read_text())
        lines = (Path(folder) / kind / "metrics.jsonl").read_text().splitlines()
    told = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return {
        "kind": kind,
        "steps": result["kept_step"],
        "seconds": round(result["seconds"], 1),
        "metrics": result["metrics"],
        "environment_steps": told[-1].get("environment_steps"),
    }


def row(result: Mapping[str, Any]) -> list[str]:
    """Return a line of the table."""
    metrics, musts = result["metrics"], KINDS[result["kind"]]
    acted = result["environment_steps"]
    return [
        f"`{result['kind']}`",
        ", ".join(f"{must.metric} **{metrics[must.metric]:.4g}**" for must in musts),
        ", ".join(must.words(metrics) for must in musts),
        f"{result['steps']:,}" + ("" if acted is None else f", {acted:,.0f} in the environment"),
        f"{result['seconds']:.0f}",
    ]


def table(results: Mapping[str, Any]) -> str:
    """Return the results as a Markdown table."""
    head = ["kind", "reached", "must reach", "steps", "seconds"]
    lines = [head, ["---"] * len(head), *(row(result) for result in results["kinds"])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every kind of learning against the figure that it must reach.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all if none is named")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FOLDER", help="a new folder for the runs (default: they are not kept)")
    chosen = parser.parse_args()
    unknown = [kind for kind in chosen.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"there is no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    if chosen.keep and Path(chosen.keep).exists():
        parser.error(f"--keep {chosen.keep}: is there already")
    results: dict[str, Any] = {"ranks": chosen.ranks, "strategy": chosen.strategy, "seed": chosen.seed, "kinds": []}
    missed = []
    for kind in chosen.kinds or KINDS:
        print(f"{kind} ...", file=sys.stderr, flush=True)
        result = run(kind, chosen.ranks, chosen.strategy, chosen.seed, chosen.keep)
        results["kinds"].append(result)
        missed += [f"{kind} {must.metric}" for must in KINDS[kind] if not must.reached(result["metrics"])]
    print(table(results))
    if (chosen.kinds, chosen.ranks, chosen.strategy, chosen.seed) == ([], 2, "ddp", 0):
        (HERE / "results" / "kinds.json").write_text(json.dumps(results, indent=2) + "\n")
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
