"""Builds the two C programs, when a test first wants one: a tenth of a second each."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Literal

Library = Literal["mit", "heimdal"]

_HERE = Path(__file__).parent
_WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# Debian's two packages live beside each other; elsewhere the one that is installed has the plain name.
_CONFIG_PROGRAMS: dict[Library, list[str]] = {
    "mit": ["krb5-config.mit", "krb5-config"],
    "heimdal": ["krb5-config.heimdal", "krb5-config"],
}
_PACKAGES: dict[Library, str] = {"mit": "libkrb5-dev", "heimdal": "heimdal-multidev"}


@functools.cache
def _directory() -> Path:
    directory = tempfile.mkdtemp(prefix="triosspi-peers-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


@functools.cache
def _config_program(library: Library) -> str | None:
    for name in _CONFIG_PROGRAMS[library]:
        program = shutil.which(name)
        if program is not None:
            version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
            if ("heimdal" in version.stdout.lower()) == (library == "heimdal"):
                return program
    return None


def _compiler() -> list[str]:
    return os.environ.get("CC", "cc").split()


def available(library: Library) -> str | None:
    """None when the programs can be built here, else the reason."""
    if shutil.which(_compiler()[0]) is None:
        return "no C compiler is installed (apt gcc)"
    if _config_program(library) is None:
        return f"the headers of {library}'s Kerberos are not installed (apt {_PACKAGES[library]})"
    return None


_building = threading.Lock()


def program(side: Literal["initiator", "acceptor"], library: Library) -> str:
    """The path of the program.

    Raises:
        RuntimeError: it cannot be built, with what the compiler said.
    """
    # A cache alone lets two threads build at once, and one run what the other's compiler still writes.
    with _building:
        return _built_program(side, library)


@functools.cache
def _built_program(side: Literal["initiator", "acceptor"], library: Library) -> str:
    config = _config_program(library)
    assert config is not None, "ask available() first"

    def words(option: str) -> list[str]:
        return subprocess.run([config, option, "gssapi"], capture_output=True, text=True, check=True).stdout.split()

    path = _directory() / f"{side}-{library}"
    build = subprocess.run(
        [
            *_compiler(),
            *_WARNINGS,
            "-std=c99",
            "-D_GNU_SOURCE",
            *(["-DHEIMDAL"] if library == "heimdal" else []),
            *words("--cflags"),
            "-o",
            os.fspath(path),
            os.fspath(_HERE / f"{side}.c"),
            *words("--libs"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if build.returncode:
        raise RuntimeError(f"{side}.c does not build against {library}'s library:\n{build.stderr}")
    return os.fspath(path)
