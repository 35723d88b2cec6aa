"""Runs every benchmark, and writes what they found.

    python bench/run.py [--quick] [--repeats N] [--only echo --only connections ...]

On the terminal a progress bar and tables; in `bench/results/` `latest.json`, `latest.md` and the plots. `make bench` calls
it. Each benchmark also runs alone; README.md beside this file says how they measure.
"""

import argparse
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.rule import Rule

import bench_backpressure
import bench_connections
import bench_echo
import bench_negotiate_stream
import bench_siege
import bench_workers
from measure import machine
from report import Outcome, progress_bar

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
PACKAGES = ("triosspi", "trio", "pyspnego", "gssapi", "cryptography")
#: In this order. Those that are not modules below are scripts with a text to show.
NAMES = (
    *("framing", "sealing", "handshake", "echo", "negotiate_stream", "connections", "crowd", "login_threads"),
    *("impersonation", "workers", "siege", "backpressure"),
)
MODULES = {
    "echo": bench_echo,
    "negotiate_stream": bench_negotiate_stream,
    "connections": bench_connections,
    "workers": bench_workers,
    "siege": bench_siege,
    "backpressure": bench_backpressure,
}
FIGURE = re.compile(r"([\d.,]+) \[ *(\d+)%\]")


@dataclass
class Text:
    """What a script has printed."""

    text: str
    failed: bool

    def markdown(self) -> str:
        """For a file."""
        return f"```text\n{self.text.strip()}\n```\n"

    def data(self) -> dict[str, Any]:
        """For JSON: the lines with figures taken apart, and the text."""
        rows = []
        for line in self.text.splitlines():
            if found := list(FIGURE.finditer(line)):
                figures = [
                    {"median": float(match[1].replace(",", "")), "spread": int(match[2]) / 100} for match in found
                ]
                rows.append({"row": " ".join(line[: found[0].start()].split()), "figures": figures})
        return {"rows": rows, "text": self.text, "failed": self.failed}


def markdown_of(outcome: Outcome) -> str:
    """For a file."""
    return "\n".join([outcome.notes, "", *(table.markdown() for table in outcome.tables())])


def first_line(*command: str) -> str | None:
    """What a program says first, or None."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCH)
    return done.stdout.splitlines()[0] if not done.returncode and done.stdout else None


def surroundings() -> dict[str, str]:
    """Machine and versions: of packages, of the libraries beneath them, of this tree."""
    found: dict[str, str | None] = {"machine": machine(), "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["OpenSSL, Python's"] = ssl.OPENSSL_VERSION
    found["OpenSSL, the system's"] = first_line("openssl", "version")
    found["Kerberos"] = first_line("krb5-config", "--version")
    found["compiler"] = first_line(*os.environ.get("CC", "cc").split(), "--version")
    commit = first_line("git", "describe", "--always", "--dirty")
    return {name: text for name, text in found.items() if text} | ({"commit": commit} if commit else {})


def run_script(console: Console, name: str, arguments: Iterable[str]) -> Text:
    """Run one, showing its last line meanwhile."""
    command = [sys.executable, "-u", str(BENCH / f"bench_{name}.py"), *arguments]
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    lines = []
    with (
        Progress(*columns, console=console, refresh_per_second=2, transient=True) as progress,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        task = progress.add_task(name, total=None)
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            progress.update(task, description=f"{name}: {line.strip()[:80]}")
    return Text("".join(lines), failed=bool(process.returncode))


def run_module(console: Console, name: str, quick: bool, repeats: int) -> Outcome:
    """Run one within this process."""
    module = MODULES[name]
    with progress_bar(console, name, module.steps(quick, repeats)) as advance:
        return module.measure(quick, repeats, advance)


def write(found: dict[str, Outcome | Text], where: dict[str, str], quick: bool) -> None:
    """Write the two files; the plots are made of the first."""
    RESULTS.mkdir(exist_ok=True)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    data = {
        "date": date,
        "quick": quick,
        "surroundings": where,
        "benchmarks": {name: outcome.data() for name, outcome in found.items()},
    }
    (RESULTS / "latest.json").write_text(json.dumps(data, indent=1) + "\n")
    lines = [f"# Benchmarks, {date}{' (a quick run)' if quick else ''}", ""]
    lines += [f"- {name}: {text}" for name, text in where.items()]
    for name, outcome in found.items():
        lines += ["", f"## bench_{name}", ""]
        lines.append(outcome.markdown() if isinstance(outcome, Text) else markdown_of(outcome))
    (RESULTS / "latest.md").write_text("\n".join(lines))


def draw(console: Console) -> None:
    """Draw the plots, where matplotlib is installed."""
    try:
        import plots  # noqa: PLC0415 - may be missing
    except ImportError as exc:
        console.print(f"no plots: {exc}", markup=False)
        return
    plots.draw_all(RESULTS)


def main() -> int:
    parser = argparse.ArgumentParser(description="run every benchmark")
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter repeats")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats, at least 5 (default: 5)")
    parser.add_argument("--only", action="append", choices=NAMES, help="one of them; may be repeated")
    options = parser.parse_args()
    repeats = max(5, options.repeats)
    console = Console()
    where = surroundings()
    for name, text in where.items():
        console.print(f"{name}: {text}", markup=False, highlight=False)
    found: dict[str, Outcome | Text] = {}
    failed = []
    for name in options.only or [name for name in NAMES if (BENCH / f"bench_{name}.py").exists()]:
        console.print(Rule(f"bench_{name}", align="left"))
        if name in MODULES:
            outcome = run_module(console, name, options.quick, repeats)
            outcome.show(console)
            found[name] = outcome
        else:
            text = run_script(console, name, ["--quick"] * options.quick + ["--repeats", str(repeats)])
            console.print(text.text, markup=False, highlight=False, soft_wrap=True)
            found[name] = text
            failed += [name] * text.failed
        write(found, where, options.quick)  # each time: a long run may be interrupted
    draw(console)
    console.print(
        f"written: {', '.join(sorted(path.name for path in RESULTS.iterdir()))} in {RESULTS}", highlight=False
    )
    if failed:
        console.print(f"failed: {', '.join(failed)}", style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
