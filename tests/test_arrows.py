"""Who may know whom: the rooms of the package, and the direction of every import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import triosspi

PACKAGE = Path(triosspi.__file__).parent

# Each room and the rooms above it that it may import. A room that is not here fails a test below.
BASE = {"_framing", "_errors"}
ABOVE: dict[str, set[str]] = {
    "_framing": set(),
    "_errors": set(),
    "_texts": {"_errors"},
    "_sealing": set(),
    "_thread_ids": set(),
    "_server_threads": set(),
    "wire": {*BASE},
    "security": {"_errors", "_texts", "_sealing"},
    "session": {*BASE, "wire", "security"},
    "channel": {*BASE, "wire", "security", "session", "_server_threads"},
    "tcp": {*BASE, "wire", "security", "session", "channel"},
    "impersonation": {"_errors", "_texts", "security", "_thread_ids", "_server_threads"},
    "service": {
        *BASE,
        *("_texts", "wire", "security", "session", "_server_threads", "channel", "tcp", "impersonation"),
        "",
    },
    "__init__": {"_errors", "wire", "security", "session", "channel", "tcp", "impersonation"},
    "__main__": {"service"},
}
KNOW_TRIO = {"_server_threads", "channel", "tcp", "impersonation", "service"}
# Everything that waits for the outside.
OUTSIDE = {"trio", "asyncio", "anyio", "socket", "ssl", "select", "selectors", "subprocess"}

FILES = sorted(path for pattern in ("*.py", "*.pyi") for path in PACKAGE.rglob(pattern))
by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].partition(".")[0]


def imported_modules(path: Path) -> Iterator[str]:
    """Every module imported anywhere in a file, in full; `if TYPE_CHECKING` is no excuse."""
    package = ["triosspi", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            # `from . import _wire` imports a module, too.
            for alias in node.names:
                if (PACKAGE.parent / module.replace(".", "/") / f"{alias.name}.py").exists():
                    yield f"{module}.{alias.name}"


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for module in imported_modules(path):
        first, *inner = module.split(".")
        if first == "triosspi":
            rooms.add(inner[0] if inner else "")
    # `from . import x` names the package itself as well as x; only the bare package is of interest.
    if "" in rooms and rooms & set(ABOVE):
        rooms.discard("")
    return rooms


@by_file
def test_imports_point_only_upwards(path):
    assert imported_rooms(path) <= {*ABOVE[room_of(path)], room_of(path)}


@by_file
def test_a_room_is_entered_by_its_door(path):
    """Of these rooms others import the `__init__` and nothing behind it. (`security` has several doors, see below.)"""
    inside = {
        module
        for module in imported_modules(path)
        if len(parts := module.split(".")) > 2
        and parts[0] == "triosspi"
        and parts[1] in {"wire", "session", "channel", "tcp"} - {room_of(path)}
    }
    assert not inside


@by_file
def test_only_the_rooms_at_the_bottom_know_trio_or_do_io(path):
    roots = {module.partition(".")[0] for module in imported_modules(path)}
    if room_of(path) not in KNOW_TRIO:
        assert not roots & OUTSIDE


@by_file
def test_only_security_imports_pyspnego_or_gssapi(path):
    roots = {module.partition(".")[0] for module in imported_modules(path)}
    if room_of(path) not in {"security", "impersonation", "service"}:
        assert not roots & {"spnego", "gssapi", "krb5", "sspilib"}


@by_file
def test_only_pyspnego_compat_imports_a_private_name_of_pyspnego(path):
    private = {
        module
        for module in imported_modules(path)
        if module.startswith("spnego.") and any(part.startswith("_") for part in module.split("."))
    }
    if path.name != "pyspnego_compat.py":
        assert not private


@by_file
def test_only_the_service_needs_click(path):
    if room_of(path) not in {"service", "__main__"}:
        assert "click" not in {module.partition(".")[0] for module in imported_modules(path)}


# The package's own __init__ imports the channels, so it is replaced by an empty one with its path.
PROBE = """
import importlib, json, sys, types
package = types.ModuleType("triosspi")
package.__path__ = [sys.argv[1]]
sys.modules["triosspi"] = package
loaded = {}
for name in sys.argv[2:]:
    importlib.import_module("triosspi." + name)
    loaded[name] = "trio" in sys.modules
print(json.dumps(loaded))
"""


def test_importing_anything_above_the_channel_does_not_import_trio():
    pure = ["_framing", "_errors", "_texts"]
    for room in ("wire", "security", "session"):
        paths = sorted((PACKAGE / room).rglob("*.py"))
        pure += [".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    # `channel` at the end shows that the probe can see it.
    run = subprocess.run(
        [sys.executable, "-c", PROBE, str(PACKAGE), *pure, "channel"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(run.stdout) == {**dict.fromkeys(pure, False), "channel": True}


def test_no_file_of_the_package_is_outside_of_the_known_rooms():
    assert {room_of(path) for path in FILES} <= set(ABOVE)


def test_what_the_server_does_in_threads_goes_through_the_one_door_that_looks_who_they_are():
    """`trio.to_thread` takes any thread of the process's cache. A client, which never impersonates, may."""
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(
            isinstance(node, ast.Attribute) and node.attr in {"to_thread", "start_thread_soon"}
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    }
    assert users == {"_server_threads.py", "service/client.py"}


def module_of(path: Path) -> str:
    parts = ["triosspi", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def top_level(node: ast.AST) -> Iterator[ast.AST]:
    """All that is run when a module is imported, and what it says to type checkers; not what stands in functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from top_level(child)


def needed_by(module: str) -> set[str]:
    """The package's own modules that one imports at its top."""
    path = MODULES[module]
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    found: set[str] = set()
    for node in top_level(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import x` needs the module x where there is one, and the package itself where x is a name in it.
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else source for name in names}
    return found & MODULES.keys()


def circles(needs: dict[str, set[str]]) -> list[list[str]]:
    """What is left when all is taken away that needs nothing, again and again, and then what nothing needs."""
    left = {module: set(needed) for module, needed in needs.items()}
    while done := {module for module, needed in left.items() if not needed & left.keys()}:
        left = {module: needed for module, needed in left.items() if module not in done}
    while unneeded := left.keys() - set().union(*left.values(), set()):
        left = {module: needed for module, needed in left.items() if module not in unneeded}
    return [[module, *sorted(needed & left.keys())] for module, needed in sorted(left.items())]


def test_no_module_needs_itself_round_about():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"], ["c", "b"]]
    needs = {module: needed_by(module) for module in MODULES}
    assert sum(map(len, needs.values())) > 200
    assert circles(needs) == []


#: Where security may be entered, and by whom: the whole package, or the rooms that are named.
DOORS: dict[str, set[str] | None] = {
    "credentials": None,
    "identity": None,
    "ntlm.accounts": None,
    "context": {"session"},
    "rules": {"impersonation"},
    "ntlm.primitives": {"service"},
    "native": {"service"},
    "sealers": {"service"},
    "pyspnego_compat": {"service"},
}


def test_security_is_entered_by_its_doors_only():
    used: dict[str, set[str]] = {}
    for path in FILES:
        if room_of(path) != "security":
            for module in imported_modules(path):
                if module.startswith("triosspi.security.") and module in MODULES:
                    used.setdefault(module.removeprefix("triosspi.security."), set()).add(room_of(path))
    assert used.keys() == DOORS.keys()
    for door, rooms in DOORS.items():
        assert rooms is None or used[door] <= rooms, door


def test_reading_an_account_file_imports_neither_pyspnego_nor_gssapi_nor_trio(tmp_path):
    path = tmp_path / "accounts"
    path.write_text("DOM:alice:secret\n")
    path.chmod(0o600)
    code = f"""
import sys
from triosspi import AccountFile
assert AccountFile({str(path)!r}).lookup("DOM", "alice").nt_hash.hex() == "878d8014606cda29677a44efa1353fc7"
print(sorted({{"spnego", "gssapi", "krb5", "cryptography", "trio"}} & sys.modules.keys()))
from triosspi import Acceptor
print("spnego" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == "[]\nTrue\n"


def test_each_name_of_the_package_is_the_same_for_type_checkers_and_for_python():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    declared = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            # A re-export by PEP 484.
            assert alias.asname == alias.name
            declared[alias.name] = node.module
    assert declared == triosspi._HOMES
    assert sorted(triosspi.__all__) == sorted([*declared, "__version__"])
    assert set(triosspi.__all__) <= set(dir(triosspi))
    for name in declared:
        assert getattr(triosspi, name) is not None
    with pytest.raises(AttributeError, match="'triosspi' has no attribute 'Accepter'"):
        triosspi.Accepter  # noqa: B018
    with pytest.raises(ImportError):
        from triosspi import Accepter  # noqa: F401
