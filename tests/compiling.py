"""The C compiler's opinion of an extension."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parent.parent / "src"


def compile_without_a_warning(name: str, place: Path) -> None:
    """Translate and compile ``src/<name>.pyx`` in a directory; assert that neither Cython nor gcc has anything to say."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("no gcc, whose warnings these are")
    pytest.importorskip("Cython", reason="no Cython to make the C")
    c_file = place / f"{name}.c"
    cython = [sys.executable, "-m", "cython", "-Wextra", "-Werror", "-o", str(c_file), str(SOURCES / f"{name}.pyx")]
    translated = subprocess.run(cython, capture_output=True, text=True, check=False)
    assert translated.returncode == 0, translated.stderr
    # -isystem: Python's headers are not ours to judge. -O2: some warnings come only with the optimiser's analysis.
    headers = sysconfig.get_path("include")
    flags = ["-O2", "-fPIC", "-Wall", "-Wsign-compare", "-Wconversion", "-Werror", "-isystem", headers]
    command = [gcc, *flags, "-c", str(c_file), "-o", str(place / f"{name}.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
