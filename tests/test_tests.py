"""How the tests are laid out: each module finds its tests by name, and each file of tests its module; see README.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import triosspi

TESTS = Path(__file__).resolve().parent
PACKAGE = Path(triosspi.__file__).parent

# Modules, or rooms with all that is in them, whose tests have other names: which, and why.
ELSEWHERE: dict[str, tuple[list[str], str]] = {
    "__main__": (["cli"], "two lines that call the command line"),
    "_errors": (["error_graphs"], "classes without behaviour, but for what a traceback of theirs shows"),
    "_server_threads": (["arrows", "impersonation_threads"], "one door, and what a thread behind it is"),
    "security": (["security_rows", "credentials"], "what is refused is claimed once, whichever module refuses it"),
    "service/config": (["configuration", "settings"], "a file becomes settings by way of all of them"),
    "service/network": (
        ["admission", "listening"],
        "who may connect, and where: the parts are judged by what comes of it",
    ),
    "service/observe/worker_files": (["metrics"], "files are judged by the exposition that comes of them"),
    "service/reasons": (["client"], "a table of texts that the client shows"),
    "service/serving": (["server", "sessions"], "a server's life is that of its parts"),
}

# Files that are about no module, and what they are about.
SCENARIOS = {
    "architecture": "docs/architecture.md",
    "account_map": "who a peer becomes: impersonation/accounts.py, beside which security/ntlm/accounts.py has its own",
    "arrows": "who may import whom",
    "contributing": "what contributors are told",
    "crowd": "honest clients among hostile ones",
    "deploy": "deploy/, under the programs that it is for",
    "environment": "docs/environment.md",
    "error_graphs": "errors and secrets",
    "hostile": "mutations of everything that a peer may send",
    "peers": "NTLM clients that others wrote",
    "readme": "README.md",
    "replay_between_machines": "what a recording is worth elsewhere",
    "restarts": "operation under load",
    "sdist": "what is shipped",
    "secrets": "logs, reprs and tracebacks",
    "siege": "honest clients among those who only sit there",
    "tests": "this",
}

MODULES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
MODULES += [Path(path.stem) for path in sorted((PACKAGE.parent).glob("*.pyx"))]
FILES = [path.stem.removeprefix("test_") for path in sorted(TESTS.glob("test_*.py"))]


def names_of(module: Path) -> Iterator[str]:
    """Its own, and those of the rooms that it is in."""
    for part in module.with_suffix("").parts:
        yield part.strip("_")


def is_about(file: str, name: str) -> bool:
    return file == name or file.startswith(f"{name}_")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_each_module_finds_its_tests_by_name_or_in_the_table(module: Path):
    if any(is_about(file, name) for name in names_of(module) for file in FILES):
        return
    places = [str(place) for place in (module.with_suffix(""), *module.parents)]
    assert any(place in ELSEWHERE for place in places), (
        f"no tests/test_{module.stem.strip('_')}.py, and no word of where"
    )


@pytest.mark.parametrize("file", FILES)
def test_each_file_of_tests_names_a_module_or_a_scenario(file: str):
    names = {name for module in MODULES for name in names_of(module)}
    assert any(is_about(file, name) for name in (*names, *SCENARIOS))


def test_the_tables_name_only_what_is_there():
    for place, (files, why) in ELSEWHERE.items():
        assert (PACKAGE / place).is_dir() or (PACKAGE / f"{place}.py").is_file(), place
        assert set(files) <= set(FILES), place
        assert why
    assert set(SCENARIOS) <= set(FILES)


@dataclass
class Function:
    """What is asked of a function in tests/."""

    name: str
    asserts: bool
    named: set[str]  # what it may call
    says: bool  # has a docstring or a comment


def functions_of(path: Path) -> Iterator[Function]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = [*ast.walk(function)]
            names = {node.id for node in inside if isinstance(node, ast.Name)}
            attributes = {node.attr for node in inside if isinstance(node, ast.Attribute)}
            comments = any(line.strip().startswith("#") for line in lines[function.lineno - 1 : function.end_lineno])
            yield Function(
                function.name,
                any(isinstance(node, ast.Assert) for node in inside)
                or bool(attributes & {"raises", "warns", "fail", "RaisesGroup"})
                or any(name == "AssertionError" or name.startswith("assert_") for name in names | attributes),
                names,
                comments or ast.get_docstring(function) is not None,
            )


def test_a_test_that_asserts_nothing_says_what_would_hang_or_raise():
    """Asserting by way of a function that it names counts. Else a comment or docstring: nobody should have to guess."""
    by_file = {path: [*functions_of(path)] for path in sorted(TESTS.rglob("*.py"))}
    shared = [each for path, functions in by_file.items() if not path.name.startswith("test_") for each in functions]
    silent = []
    for path, own in by_file.items():
        functions = [*own, *shared]
        asserting = {each.name for each in functions if each.asserts}
        while more := {each.name for each in functions if each.named & asserting} - asserting:
            asserting |= more
        silent += [
            f"{path.name}: {each.name}"
            for each in own
            if each.name.startswith("test_") and each.name not in asserting and not each.says
        ]
    assert silent == []
