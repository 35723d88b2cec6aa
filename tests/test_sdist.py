"""The sdist holds what was written by hand, and is enough to build and install from. No network is needed."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A PEP 517 frontend in two lines; the backend runs in a process of its own, as it must, in the project's directory.
MAKE_SDIST = "import sys; from setuptools import build_meta; print('made:' + build_meta.build_sdist(sys.argv[1]))"


def run(*command: str | Path, cwd: Path) -> str:
    # Only what a user's shell would have: no PYTHONPATH, no coverage, nothing that leads to the source tree.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "CC", "CFLAGS", "TMPDIR") if name in os.environ}
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, made from a copy of what the source tree holds: several tests may build in the tree at once."""
    pytest.importorskip("Cython", reason="no Cython to build with")
    place = tmp_path_factory.mktemp("sdist")
    tree = place / "tree"
    tree.mkdir()
    leave_out = {
        ".git",
        ".venv",
        ".venvs",
        "build",
        "dist",
        "__pycache__",
        ".hypothesis",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
    }
    for source in sorted(ROOT.rglob("*")):
        inside = source.relative_to(ROOT)
        if leave_out.isdisjoint(inside.parts) and source.suffix != ".so" and "egg-info" not in str(inside):
            if source.is_dir():
                (tree / inside).mkdir(parents=True, exist_ok=True)
            elif source.is_file():
                (tree / inside).parent.mkdir(parents=True, exist_ok=True)
                (tree / inside).write_bytes(source.read_bytes())
    # What a build leaves behind must not slip in.
    (tree / "src" / "_framing.c").write_text("#error a generated file was shipped\n")
    made = run(sys.executable, "-c", MAKE_SDIST, place, cwd=tree)
    (name,) = (line.removeprefix("made:") for line in made.splitlines() if line.startswith("made:"))
    return place / name


def names_in(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}


def test_the_sdist_ships_sources_and_nothing_generated(sdist: Path) -> None:
    names = names_in(sdist)
    assert names >= {
        "LICENSE",
        ".pre-commit-config.yaml",
        "CONTRIBUTING.md",
        "Makefile",
        "bench/bench_framing.py",
        "deploy/Dockerfile",
        "deploy/Dockerfile.dockerignore",
        "deploy/haproxy.cfg",
        "deploy/impersonation.conf",
        "deploy/kubernetes.yaml",
        "deploy/triosspi.service",
        "deploy/triosspi.socket",
        "docs/clients.md",
        "docs/deployment.md",
        "pyproject.toml",
        "scripts/os-packages.sh",
        "setup.py",
        "src/_framing.pyx",
        "src/sealing/kerberos.pxi",
        "src/shared/bytes.pxi",
        "src/triosspi/__init__.py",
        "src/triosspi/_framing.pyi",
        "src/triosspi/py.typed",
        "src/triosspi/service/config/example.toml",
        "tests/framing_oracle.py",
        "tests/peers/kerberos/acceptor.c",
        "tests/peers/kerberos/initiator.c",
        "tests/peers/kerberos/lines.h",
        "tests/test_framing.py",
    }
    assert [name for name in names if name.endswith((".so", ".pyd", ".pyc"))] == []
    # What Cython makes; the C programs of tests and benchmarks were written by hand.
    assert [name for name in names if name.endswith(".c") and name.startswith("src/")] == []


@pytest.mark.long("compiles all extensions")
def test_the_sdist_builds_and_installs_by_itself_in_a_clean_environment(sdist: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    # Empty: the setuptools that Python 3.11 puts into a venv is too old, and would hide the one lent below.
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    # The build tools and the dependencies are those of the running environment, lent through a .pth: no downloads. Its
    # editable triosspi is not lent (a .pth in a directory that a .pth names is not read), as the end of this test checks.
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (purelib / "tools.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", sdist, cwd=tmp_path)

    program = """
import importlib.metadata, importlib.resources, triosspi
from triosspi import _framing
print(_framing.__file__)
print(_framing.split_record(_framing.pack_record(b"trailer", b"data")))
print(importlib.metadata.distribution("triosspi").version)
print(*sorted(f.name for f in importlib.resources.files(triosspi).iterdir() if f.name in ("py.typed", "_framing.pyi")))
"""
    where, split, version, typing_files = run(python, "-c", program, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(purelib)
    assert split == "(b'trailer', b'data')"
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert typing_files == "_framing.pyi py.typed"
