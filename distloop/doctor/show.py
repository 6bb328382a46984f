"""Findings on the screen: one line each, and a table of links that fits."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from distloop.doctor.findings import Finding, Level
from distloop.doctor.links import Link
from distloop.report.machine import in_words

STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.FAILED: "bold red"}
NAME = 23  # columns: "sums over shared_memory"
WIDEST = 8  # ranks beside each other; of more, the slowest pairs are listed


def line(finding: Finding, width: int | None) -> str:
    """Return a finding as a line; wrapped with an indent where there is a terminal's width."""
    where = f"{finding.host}: " if finding.host else ""
    text = f"{where}{finding.found}" + (f" -> {finding.advice}" if finding.advice else "")
    head = f"{finding.level:<8} {finding.check:<{NAME}} "
    if width is None:
        return head + text
    indent = len(head) if width >= 2 * len(head) else 4
    return textwrap.fill(head + text, max(width, 20), subsequent_indent=" " * indent)


def say(finding: Finding) -> None:
    """Print a finding, with colours where there is a terminal."""
    if not sys.stdout.isatty():
        print(line(finding, None), flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    text = Text(line(finding, shutil.get_terminal_size().columns))
    text.stylize(STYLES[finding.level], 0, len(finding.level))
    Console(highlight=False, soft_wrap=True).print(text)


def summary(findings: Iterable[Finding]) -> str:
    """Return how many findings of each level there are."""
    counts = Counter(finding.level for finding in findings)
    return ", ".join(f"{counts[level]} {level}" for level in Level)


def links(found: Sequence[Link], size: int) -> None:
    """Print latency and bandwidth: a row per rank, or the slowest pairs where there are many."""
    from rich.console import Console
    from rich.table import Table

    print("latency and bandwidth between ranks, one way:")
    table = Table(box=None, pad_edge=False)
    if size <= WIDEST and len(found) == size * (size - 1) // 2:
        by_pair = {(link.one, link.other): link for link in found}
        table.add_column("rank")
        for rank in range(1, size):
            table.add_column(str(rank), justify="right")
        for one in range(size - 1):
            cells = [by_pair.get((one, other)) for other in range(1, size)]
            table.add_row(str(one), *("" if cell is None else _cell(cell) for cell in cells))
    else:
        for name in ("ranks", "latency", "bandwidth"):
            table.add_column(name, justify="right")
        for link in sorted(found, key=lambda link: link.bandwidth)[:WIDEST]:
            table.add_row(f"{link.one}-{link.other}", f"{1e6 * link.latency:.0f} us", f"{in_words(link.bandwidth)}/s")
    Console(highlight=False).print(table)


def _cell(link: Link) -> str:
    return f"{1e6 * link.latency:.0f} us\n{in_words(link.bandwidth)}/s"
