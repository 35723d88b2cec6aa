"""Plots of `bench/results/latest.json`, as SVG beside it.

    python bench/plots.py [FOLDER]

Ours are blue, the floor is light, the others are grey. Whiskers are the spread.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
# The same figures, the same bytes.
mpl.rcParams |= {"svg.hashsalt": "triosspi", "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none"}

from matplotlib import pyplot as plt  # noqa: E402 - only after the backend was chosen
from matplotlib.axes import Axes  # noqa: E402

OURS, FLOOR, OTHER = "#2563eb", "#cbd5e1", "#94a3b8"

Rows = dict[str, dict[str, float]]


def bars(axes: Axes, title: str, rows: Rows) -> None:
    """Horizontal bars with their spread and their number, in the rows' order."""
    names = list(rows)
    medians = [rows[name]["median"] for name in names]
    whiskers = [rows[name]["median"] * rows[name]["spread"] for name in names]
    colours = [OURS if name.startswith("triosspi") else FLOOR if name == "Trio, plain" else OTHER for name in names]
    axes.barh(
        names, medians, xerr=whiskers, color=colours, height=0.7, error_kw={"elinewidth": 0.8, "ecolor": "#475569"}
    )
    for index, (median, whisker) in enumerate(zip(medians, whiskers, strict=True)):
        text = f" {median:,.0f}" if median >= 100 else f" {median:.1f}"
        axes.text(median + whisker, index, text, va="center", fontsize=8)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlim(0, 1.15 * max(median + whisker for median, whisker in zip(medians, whiskers, strict=True)))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def panels(path: Path, title: str, parts: dict[str, Rows], width: int = 2) -> None:
    """A plot of several panels beside and below each other."""
    width = min(width, len(parts))
    height = -(-len(parts) // width)
    rows = max(len(rows) for rows in parts.values())
    figure, axes = plt.subplots(
        height, width, figsize=(4.6 * width, height * (0.7 + 0.24 * rows)), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for place in axes.flat[len(parts) :]:
        place.set_visible(False)
    for index, (place, (name, rows_of_part)) in enumerate(zip(axes.flat, parts.items(), strict=False)):
        bars(place, name, rows_of_part)
        if index % width and list(rows_of_part) == list(next(iter(parts.values()))):
            place.set_yticklabels([])
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def by_column(rows: dict[str, dict[str, dict[str, float]]]) -> dict[str, Rows]:
    """Figures by row and column, to figures by column and row."""
    columns: dict[str, Rows] = {}
    for row, figures in rows.items():
        for column, figure in figures.items():
            columns.setdefault(column, {})[row] = figure
    return columns


def draw_echo(found: dict[str, Any], folder: Path) -> None:
    """CPU per message and messages per second, a panel for each case."""
    figures = found["figures"]
    panels(
        folder / "echo-cpu.svg",
        "Server CPU per echoed message, µs (messages outstanding x size)",
        by_column(figures["server CPU, us per message"]),
    )
    panels(
        folder / "echo-rate.svg",
        "Messages echoed per second, one core (messages outstanding x size)",
        by_column(figures["messages per second"]),
    )


def draw_connections(found: dict[str, Any], folder: Path) -> None:
    """Memory per idle connection."""
    figures = found["figures"]["KiB of the server's memory per idle connection"]
    panels(folder / "connections.svg", "Memory of the server per idle connection, KiB", {"": by_column(figures)["KiB"]})


def draw_handshake(found: dict[str, Any], folder: Path) -> None:
    """The acceptor's CPU for a login, ours beside bare pyspnego."""
    parts = {
        row["row"]: dict(zip(("spnego.server()", "triosspi"), row["figures"], strict=True))
        for row in found["rows"]
        if len(row["figures"]) == 2
    }
    if parts:
        panels(folder / "handshake.svg", "The acceptor's CPU per login, µs", parts)


DRAW: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "echo": draw_echo,
    "connections": draw_connections,
    "handshake": draw_handshake,
}


def draw_all(folder: Path) -> None:
    """Every plot that there are figures for."""
    benchmarks = json.loads((folder / "latest.json").read_text())["benchmarks"]
    for name, draw in DRAW.items():
        if name in benchmarks and not benchmarks[name].get("failed"):
            draw(benchmarks[name], folder)


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "results")
