"""Draw docs/images/collectives-*.png from benchmarks/results: python benchmarks/pictures.py.

What has not been measured is not drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sections import MIB, auto_network, size, speed, wire_bound

from distloop.observers.curves import new_figure

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "images"
OURS, THEIRS, MPI, BOUND = "C0", "0.55", "C1", "black"
BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind text, over lines
Sections = dict[str, dict[str, Any]]


def median_ms(cell: dict[str, Any], side: str) -> float:
    return 1e3 * statistics.median(cell["times"][side])


def cells_of(sections: Sections, names: Iterable[str], **wanted: Any) -> list[dict[str, Any]]:
    """Return the measured cells of some sections whose values are those wanted."""
    found = [cell for name in names for cell in sections.get(name, {}).get("cells", []) if "times" in cell]
    return [cell for cell in found if all(cell.get(key) == value for key, value in wanted.items())]


def draw_one_host(sections: Sections) -> Any:
    """Time over size on one host, with gloo, MPI and what memory can do."""
    figure = new_figure(9.0, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, count in zip(panels, (2, 4), strict=True):
        cells = cells_of(sections, ["small", "large"], ranks=count)
        between = cells_of(sections, ["auto"], ranks=count, hosts=0, auto="shared_memory")
        cells += [cell for cell in between if 64 * 1024 < cell["bytes"] < 16 * MIB]
        under_mpi = cells_of(sections, ["mpi"], ranks=count)
        for label, colour, found, side in (
            ("gloo", THEIRS, cells, "library"),
            ("MPI Allreduce", MPI, under_mpi, "library"),
            ("shared_memory", OURS, cells, "shared_memory"),
        ):
            sides = ((cell, "auto" if "auto" in cell["times"] and side != "library" else side) for cell in found)
            points = sorted((cell["bytes"], median_ms(cell, taken)) for cell, taken in sides)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=4)
        streams = [cell for cell in cells if "copy" in cell["times"]]
        for cell in streams:
            bound = min(median_ms(cell, stream) for stream in ("copy", "scale", "add"))
            label = "memory bound" if cell is streams[0] else None
            axes.plot([cell["bytes"] / 2, cell["bytes"] * 2], [bound, bound], "--", color=BOUND, label=label, lw=1)
        axes.set(xscale="log", yscale="log", title=f"{count} ranks on one host", xlabel="size")
        sizes_below(axes, [1024, 16 * 1024, 256 * 1024, 4 * MIB, 64 * MIB])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms per all-reduce")
    panels[0].legend(frameon=False)
    return figure


def sizes_below(axes: Any, sizes: list[int]) -> None:
    axes.set_xticks(sizes, [size(nbytes) for nbytes in sizes])
    axes.minorticks_off()


def bars(axes: Any, names: list[str], values: list[float], texts: list[str], colours: list[str]) -> None:
    """Draw horizontal bars from the top downwards, each with its text behind it."""
    places = range(len(names))
    axes.barh(places, values, color=colours, height=0.72)
    for place, value, text in zip(places, values, texts, strict=True):
        axes.annotate(text, (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8.5, bbox=BLANK)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(values))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("ms")


def draw_latency(sections: Sections) -> Any:
    """Each algorithm's time between hosts 5 ms apart."""
    figure = new_figure(9.0, 5.4)
    cells = cells_of(sections, ["latency"])
    for axes, cell in zip(figure.subplots(2, 2).flat, cells, strict=False):
        times = {side: median_ms(cell, side) for side in cell["sides"]}
        order = sorted(times, key=lambda side: (side == "library", times[side]))
        names = ["gloo" if n == "library" else f"auto ({cell['auto']})" if n == "auto" else n for n in order]
        texts = [f"{times[n]:.0f} ms, {times['library'] / times[n]:.1f}x" for n in order]
        texts[-1] = f"{times['library']:.0f} ms"
        bars(axes, names, [times[n] for n in order], texts, [THEIRS if n == "library" else OURS for n in order])
        axes.axvline(cell["delay_ms"], color=BOUND, linestyle="--", linewidth=1)
        axes.set_title(
            f"{cell['ranks']} hosts, {cell['delay_ms']:g} ms one way (dashed), {size(cell['bytes'])}", fontsize=10
        )
    return figure


def draw_bandwidth(sections: Sections) -> Any:
    """Times over limited links, with what the links must carry at least."""
    figure = new_figure(9.0, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    measured = cells_of(sections, ["bandwidth"])
    for cell in measured[:1]:  # all are of one size on one network
        times = {side: median_ms(one, side) for one in measured for side in one["sides"]}
        for narrow in cells_of(sections, ["bf16"]):
            times["bf16 direct"] = median_ms(narrow, "bf16 direct")
        order = sorted(times, key=lambda side: (side == "library", times[side]))
        bound = 1e3 * wire_bound(cell)
        texts = [f"{times[n]:.0f} ms" + ("" if "bf16" in n else f", {bound / times[n]:.0%} of bound") for n in order]
        names = ["gloo" if n == "library" else n.replace("bf16 direct", "direct, bf16\non the wire") for n in order]
        bars(left, names, [times[n] for n in order], texts, [THEIRS if n == "library" else OURS for n in order])
        left.axvline(bound, color=BOUND, linestyle="--", linewidth=1)
        left.axvline(bound / 2, color=BOUND, linestyle=":", linewidth=1)
        left.set_xlim(0, 1.6 * max(times.values()))
        title = f"{cell['hosts']} hosts, links of {speed(cell['rate'])}, {size(cell['bytes'])}"
        title += "\nwire bound: fp32 dashed, bf16 dotted"
        left.set_title(title, fontsize=10)
    names, values, texts, colours = [], [], [], []
    for cell in cells_of(sections, ["hierarchical"]):
        for side in ("hierarchical", "library"):
            names.append(f"{'gloo' if side == 'library' else side}, {size(cell['bytes'])}")
            values.append(median_ms(cell, side))
            gain = f", {median_ms(cell, 'library') / values[-1]:.2f}x" if side != "library" else ""
            texts.append(f"{values[-1]:.0f} ms{gain}")
            colours.append(THEIRS if side == "library" else OURS)
    if names:
        bars(right, names, values, texts, colours)
        right.set_title("2 hosts of 4 ranks, links of 1 Gbit/s", fontsize=10)
    return figure


def draw_auto(sections: Sections) -> Any:
    """How many times faster than gloo the calibrated choice is, and what it chose, over sizes and networks."""
    from matplotlib.colors import TwoSlopeNorm

    cells = cells_of(sections, ["auto"])
    counts, sizes = sorted({c["ranks"] for c in cells}), sorted({c["bytes"] for c in cells})
    measured = {n: list(dict.fromkeys(auto_network(c) for c in cells if c["ranks"] == n)) for n in counts}
    heights = [len(networks) for networks in measured.values()]
    figure = new_figure(7.6, 0.4 * sum(heights) + 0.4 * len(counts) + 0.5)
    panels = figure.subplots(len(counts), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (count, networks) in zip(panels, measured.items(), strict=True):
        grid = [[math.nan] * len(sizes) for _ in networks]
        for cell in (c for c in cells if c["ranks"] == count):
            row, column = networks.index(auto_network(cell)), sizes.index(cell["bytes"])
            ratio = statistics.median(
                b / a for a, b in zip(cell["times"]["auto"], cell["times"]["library"], strict=True)
            )
            grid[row][column] = math.log2(ratio)
            picked = cell["auto"].replace("_", " ").replace("hierarchical", "hierarch.").replace("library", "gloo")
            text = f"{ratio:.2f}x" if ratio < 1.95 else f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"
            axes.text(column, row - 0.15, text, ha="center", va="center", fontsize=9, fontweight="bold")
            axes.text(
                column,
                row + 0.24,
                picked.replace("naive pipelined", "pipelined"),
                ha="center",
                va="center",
                fontsize=7,
            )
        axes.imshow(grid, cmap="RdYlGn", norm=TwoSlopeNorm(0.0, -1.0, 5.0), aspect="auto", alpha=0.75)
        axes.set_xticks(range(len(sizes)), [size(b) for b in sizes])
        axes.set_yticks(range(len(networks)), networks)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{count} ranks", fontsize=10)
    figure.suptitle("Times faster than gloo, and the algorithm chosen", fontsize=11)
    return figure


def draw_overlap(result: dict[str, Any]) -> Any:
    """The time per step: forward, backward, and what of communication shows."""
    figure = new_figure(8.0, 3.1)
    axes = figure.subplots()
    rows = sorted(result["rows"], key=lambda row: row["ms"])
    compute = [("forward", "0.75", result["forward"]), ("backward", "0.55", result["backward"])]
    left = 0.0
    for name, colour, seconds in compute:
        axes.barh(range(len(rows)), 1e3 * seconds, left=left, color=colour, height=0.7, label=name)
        left += 1e3 * seconds
    shown = [row["ms"] - left for row in rows]
    colours = ["C1" if row["name"].startswith("ddp") else OURS for row in rows]
    axes.barh(range(len(rows)), shown, left=left, color=colours, height=0.7)
    for colour, whose in ((OURS, "distloop"), ("C1", "DDP")):
        axes.barh([0], [0], color=colour, label=f"not hidden, {whose}")
    for place, row in enumerate(rows):
        text = f"{row['ms']:.0f} ms, {row['efficiency']:.1%} of ideal"
        where = (max(row["ms"], 1e3 * result["ideal"]), place)
        axes.annotate(text, where, (3, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.axvline(1e3 * result["ideal"], color=BOUND, linestyle="--", linewidth=1, label="ideal")
    axes.set_yticks(range(len(rows)), [row["name"].replace("25 MB", "25 MB\n(default)") for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(row["ms"] for row in rows))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("ms per step")
    gradients = f"{result['bytes'] / MIB:g} MiB of gradients in {result['layers']} layers"
    axes.set_title(
        f"{result['ranks']} emulated accelerators, links of {speed(result['rate'])}, {gradients}", fontsize=10
    )
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


PICTURES: dict[str, tuple[tuple[str, ...], Callable[[Sections], Any]]] = {
    "one-host": (("small", "large"), draw_one_host),
    "latency": (("latency",), draw_latency),
    "bandwidth": (("bandwidth", "hierarchical"), draw_bandwidth),
    "auto": (("auto",), draw_auto),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder with the JSON files")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for the pictures")
    options = parser.parse_args()
    figures = {}
    if (path := options.results / "all_reduce.json").exists():
        sections = {name: found for name, found in json.loads(path.read_text())["sections"].items() if found}
        for name, (needed, draw) in PICTURES.items():
            if any(cells_of(sections, [section]) for section in needed):
                figures[name] = draw(sections)
    if (path := options.results / "overlap.json").exists():
        figures["overlap"] = draw_overlap(json.loads(path.read_text()))
    for name, figure in figures.items():
        target = options.images / f"collectives-{name}.png"
        figure.savefig(target, dpi=110)
        print(target)


if __name__ == "__main__":
    main()
