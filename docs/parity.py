"""Hold every strategy on every transport to plain PyTorch, print how far it is off, and write docs/parity.md.

    python docs/parity.py               # 10 minutes on 2 cores
    python docs/parity.py --only mpi    # one transport; what others came to before stays
    python docs/parity.py --strategy ddp  # one strategy, likewise
    python docs/parity.py --quick       # 1 in 6 of the cases, nothing written

What it finds is kept in benchmarks/results/parity.json, row by row, so that a run that is cut off loses nothing. Ends
with 1 if a difference is above 1e-12 in double or 1e-6 in single precision.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results" / "parity.json"
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import click  # noqa: E402
import torch  # noqa: E402

from tests.parity import Case, Outcome, difference, run_cases, tolerance, trained_plainly  # noqa: E402
from tests.ranks import OPEN_MPI, in_processes, in_threads, under_mpirun  # noqa: E402
from tests.test_exactness import by_stages, grid, in_single_precision  # noqa: E402

BUCKETED = ["naive", "ring", "direct", "auto"]
SENT_BY_US = [*BUCKETED, "tree", "zero_offload"]
PLACES = [
    *itertools.product(["threads"], BUCKETED, [2, 3, 4, 5, 8]),
    *itertools.product(["threads"], ["tree", "zero_offload"], [1, 2, 3, 4, 5, 8]),
    *itertools.product(["torch"], ["ddp", *SENT_BY_US], [2, 3, 4]),
    *itertools.product(["torch"], ["deepspeed"], [1, 2, 3, 4]),
    *itertools.product(["sockets", "shared_memory"], SENT_BY_US, [2, 3, 4]),
    *itertools.product(["mpi"], ["ddp", *SENT_BY_US], [2, 4]),
]
PAGE = """# Parity

What `python docs/parity.py` (`make parity`) printed: the largest relative difference, over all steps and ranks, of
the applied gradients and of the final parameters from a few lines of plain PyTorch that see each global batch as a
whole ([tests/parity.py](../tests/parity.py)). Behind each row are {cases} trainings for each number of ranks: a
classifier, a mean over tokens, a GAN with turns and a moving average, and a policy gradient with as many samples as
each rank happened to collect; with and without accumulation (micro-batches of 1, 2 and 3), clipping by norm and by
value, and a loss scale as for fp16; SGD and AdamW; {double} of them in double precision, {single} in single. Buckets
hold about a hundred bytes, so that there are several even in models this small. One rank has nothing to collect: its
{alone_cases} trainings are off by {alone_double:.0e} and {alone_single:.0e}.

{table}

`deepspeed` computes in single precision alone, and shows no gradients: its figures are of the parameters after each
step, under stages 1, 2 and 3 (stage 3: a classifier and a mean over tokens), with and without offload.

`tree` cuts global batches that are the same on every rank: it has no policy gradient, and the same figures everywhere.

At most 1e-12 in double and 1e-6 in single precision are promised. Left out in single precision: AdamW on the policy
gradient, where rounding alone gives 1.4e-6.
"""


@dataclass
class Row:
    """What a strategy came to on a transport, for one number of ranks."""

    transport: str
    strategy: str
    ranks: int
    double: float
    single: float
    seconds: float

    @property
    def kept(self) -> bool:
        return self.double <= 1e-12 and self.single <= 1e-6


def cases_for(strategy: str, ranks: int, *, quick: bool) -> list[Case]:
    cases = grid(strategy, ranks)[:: 6 if quick else 1]
    if strategy == "deepspeed":
        return by_stages(cases)
    return cases + in_single_precision(cases)


def outcomes(transport: str, ranks: int, cases: list[Case]) -> list[list[Outcome]]:
    if transport == "threads":
        return in_threads(ranks, run_cases, cases)
    if transport == "mpi":
        return under_mpirun(ranks, run_cases, cases)
    return in_processes(ranks, run_cases, cases, over=transport)


def measure(transport: str, strategy: str, ranks: int, *, quick: bool) -> Row:
    begun = time.monotonic()
    cases = cases_for(strategy, ranks, quick=quick)
    by_rank = outcomes(transport, ranks, cases)
    worst = {torch.float64: 0.0, torch.float32: 0.0}
    for i, case in enumerate(cases):
        expected = trained_plainly(case)
        off = max(difference(by_rank[rank][i], expected) for rank in range(ranks))
        worst[case.dtype] = max(worst[case.dtype], off)
        if off > tolerance(case):
            print(f"off by {off:.1e}: {case}", flush=True)
    return Row(transport, strategy, ranks, worst[torch.float64], worst[torch.float32], time.monotonic() - begun)


def rows(only: str | None, of: str | None, *, quick: bool) -> Iterator[Row]:
    missing = OPEN_MPI.missing()
    for transport, strategy, ranks in PLACES:
        if (transport == "mpi" and missing is not None) or only not in (None, transport) or of not in (None, strategy):
            continue
        row = measure(transport, strategy, ranks, quick=quick)
        print(
            f"{row.transport:<14} {row.strategy:<7} {row.ranks} ranks  double {row.double:.1e}  single {row.single:.1e}"
            f"  {row.seconds:5.1f} s{'' if row.kept else '  MISSED'}",
            flush=True,
        )
        yield row
    if missing is not None:
        print(f"mpi: not run, {missing}")


def keep(row: Row) -> None:
    """Put a row into the file of results, in place of the one that was there."""
    rest = [
        one
        for one in kept_rows()
        if (one.transport, one.strategy, one.ranks) != (row.transport, row.strategy, row.ranks)
    ]
    order = {place: number for number, place in enumerate([("alone", "single", 1), *PLACES])}
    every = sorted([*rest, row], key=lambda one: order[one.transport, one.strategy, one.ranks])
    RESULTS.write_text(json.dumps([asdict(one) for one in every], indent=1) + "\n")


def kept_rows() -> list[Row]:
    return [Row(**values) for values in json.loads(RESULTS.read_text())] if RESULTS.exists() else []


def table(found: list[Row]) -> str:
    lines = ["| transport | strategy | ranks | worst, double | worst, single |", "|---|---|---|---|---|"]
    for (transport, strategy), group in itertools.groupby(found, key=lambda row: (row.transport, row.strategy)):
        own = list(group)
        ranks = ", ".join(str(row.ranks) for row in own)
        double, single = max(row.double for row in own), max(row.single for row in own)
        shown = "" if strategy == "deepspeed" else f"{double:.1e}"
        lines.append(f"| {transport} | `{strategy}` | {ranks} | {shown} | {single:.1e} |")
    return "\n".join(lines)


@click.command()
@click.option("--quick", is_flag=True, help="1 in 6 of the cases, and nothing is written.")
@click.option("--only", type=click.Choice(sorted({place[0] for place in PLACES})), help="One transport.")
@click.option("--strategy", type=click.Choice(sorted({place[1] for place in PLACES})), help="One strategy.")
def main(quick: bool, only: str | None, strategy: str | None) -> None:
    """Print and write the parity table."""
    torch.set_num_threads(1)
    alone = replace(measure("threads", "naive", 1, quick=quick), transport="alone", strategy="single")
    found = []
    for row in itertools.chain([alone], rows(only, strategy, quick=quick)):
        found.append(row)
        if not quick:
            keep(row)
    if not quick:
        alone, *found = kept_rows()
    else:
        found.remove(alone)
    print(f"\n{table(found)}")
    if not quick:
        cases = cases_for("naive", 2, quick=False)
        double = sum(case.dtype == torch.float64 for case in cases)
        text = PAGE.format(
            cases=len(cases),
            double=double,
            single=len(cases) - double,
            alone_cases=len(cases),
            alone_double=alone.double,
            alone_single=alone.single,
            table=table(found),
        )
        (HERE / "parity.md").write_text(text)
    raise SystemExit(0 if all(row.kept for row in [alone, *found]) else 1)


if __name__ == "__main__":
    main()
