"""docs/architecture.md names the files that there are: who moves one, or adds one, says there what it does."""

from __future__ import annotations

import re
from pathlib import Path

import triosspi

DOCUMENT = Path(__file__).parent.parent / "docs/architecture.md"
PACKAGE = Path(triosspi.__file__).parent
SERVICE = PACKAGE / "service"


def named(heading: str) -> set[str]:
    """The files in the tables of a section, each with its room."""
    section = DOCUMENT.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found = set()
    room = ""
    for line in section.splitlines():
        if match := re.match(r"\*\*`([a-z_/]+/)`\*\*", line):
            room = match[1]
        elif line.startswith("| `"):
            names = re.findall(r"`([a-z_/]+\.(?:py|pyx|toml))`", line.split(" | ")[0])
            found |= {name if name.startswith("src/") else room + name for name in names}
    return found


def test_every_file_of_the_service_is_named_and_no_other() -> None:
    there = {path.relative_to(SERVICE) for pattern in ("*.py", "*.toml") for path in SERVICE.rglob(pattern)}
    # A room's first file is its heading; the command line has more in it.
    expected = {path.as_posix() for path in there if path.name != "__init__.py" or path.parent.name == "cli"}
    assert named("The service's rooms") == expected


def test_every_file_of_the_library_is_named_and_no_other() -> None:
    there = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    expected = {path.as_posix() for path in there if path.parts[0] != "service" and not path.stem.startswith("__")}
    assert {name for name in named("The library's rooms") if not name.startswith("src/")} == expected


def test_what_the_document_says_of_options_and_metrics_is_where_it_says() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:config|observe|tests|docs)/[a-z_]+\.[a-z]+)`", text):
        root = SERVICE if name.startswith(("config/", "observe/")) else DOCUMENT.parent.parent
        assert (root / name).exists(), name
