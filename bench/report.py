"""What a benchmark found: figures with their spread, tables for the terminal and for Markdown, goals, progress."""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from measure import machine

#: Says what is being done, and that it is done.
Advance = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """The samples of one thing, one from each repeat."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / 2 / abs(self.median) if self.median else 0.0

    def ratio_to(self, other: "Figure") -> "Figure":
        """Each sample to the one of the same repeat: what slowed the machine then slowed both."""
        return Figure(tuple(mine / its for mine, its in zip(self.samples, other.samples, strict=True)))

    def __str__(self) -> str:
        median = self.median
        digits = 0 if abs(median) >= 1000 else 1 if abs(median) >= 100 else 2
        return f"{median:,.{digits}f} [{self.spread:.0%}]"


@dataclass(frozen=True)
class Goal:
    """A ratio to reach."""

    what: str
    figure: Figure
    limit: float
    side: Literal["at most", "at least"] = "at most"

    @property
    def met(self) -> bool:
        """Whether the median does."""
        return self.figure.median <= self.limit if self.side == "at most" else self.figure.median >= self.limit


@dataclass
class Table:
    """Rows of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self) -> RichTable:
        """For the terminal."""
        table = RichTable(title=escape(self.title), title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(escape(column), justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """For a file."""
        lines = [self.columns, ["---", *("---:" for _ in self.columns[1:])], *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@dataclass
class Outcome:
    """All that one benchmark has to say.

    Attributes:
        notes: How it was measured.
        figures: Samples by unit, by row, by column.
        goals: Which were set.
    """

    notes: str
    figures: dict[str, dict[str, dict[str, Figure]]] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)

    def tables(self) -> list[Table]:
        """A table for each unit, and one for the goals."""
        tables = []
        for unit, rows in self.figures.items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            cells = [[name, *(str(row.get(column, "-")) for column in columns)] for name, row in rows.items()]
            tables.append(Table(unit, ["", *columns], cells))
        if self.goals:
            cells = [
                [goal.what, str(goal.figure), f"{goal.side} {goal.limit:g}", "yes" if goal.met else "no"]
                for goal in self.goals
            ]
            tables.append(Table("Ratios in this run", ["", "median [spread]", "goal", "met"], cells))
        return tables

    def show(self, console: Console) -> None:
        """Print it."""
        console.print(self.notes, highlight=False, markup=False)
        for table in self.tables():
            console.print(table.rich(), highlight=False)

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "notes": self.notes,
            "figures": {
                unit: {
                    row: {
                        column: {"median": figure.median, "spread": figure.spread, "samples": figure.samples}
                        for column, figure in columns.items()
                    }
                    for row, columns in rows.items()
                }
                for unit, rows in self.figures.items()
            },
            "goals": [{**asdict(goal), "median": goal.figure.median, "met": goal.met} for goal in self.goals],
        }


@contextmanager
def progress_bar(console: Console, title: str, steps: int) -> Iterator[Advance]:
    """A progress bar, drawn rarely: it runs on the load's core."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, refresh_per_second=2, transient=True) as progress:
        task = progress.add_task(title, total=steps)
        yield lambda what: progress.update(task, advance=1, description=f"{title}: {what}")


def run_alone(
    description: str, steps: Callable[[bool, int], int], measure: Callable[[bool, int, Advance], Outcome]
) -> None:
    """The `main` of a benchmark.

    Args:
        description: What it is about.
        steps: How often `measure` will say that it has advanced.
        measure: The benchmark. Both take: whether to be quick, and the repeats.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter repeats")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats, at least 5 (default: 5)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    repeats = max(5, options.repeats)
    console = Console()
    console.print(f"machine: {machine()}", highlight=False)
    with progress_bar(console, "measuring", steps(options.quick, repeats)) as advance:
        outcome = measure(options.quick, repeats, advance)
    outcome.show(console)
    if options.json:
        options.json.write_text(json.dumps(outcome.data(), indent=1) + "\n")


def columns_of(samples: Sequence[dict[str, float]]) -> dict[str, Figure]:
    """Repeats of several figures, each by its name."""
    return {name: Figure(tuple(sample[name] for sample in samples)) for name in samples[0]}
