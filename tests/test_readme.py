"""The README: what it shows is run as it stands."""

from __future__ import annotations

import random
import re
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import trio

from peers import csharp
from peers.requirements import require_nothing
from programs import Running, environment, run, running, terminal
from triosspi.service import cli
from triosspi.service.apps import load_app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

PASSWORD = "correct horse"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def file_shown(name: str) -> str:
    """The Python block whose introduction names this file."""
    found = re.search(rf"^[^\n]*`{re.escape(name)}`[^\n]*:\n\n```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found, f"the README shows no {name}"
    return found[1]


def free_port() -> int:
    """A port that is free, and that the system gives to nobody who asks for any: two tests may look at once."""
    rng = random.Random()
    while True:
        port = rng.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's directory after following the README so far."""
    path = tmp_path_factory.mktemp("readme")
    port = str(free_port())
    for name in ("server.py", "client.py"):
        text = file_shown(name)
        # The only thing that is changed.
        assert len(re.findall(r"\b2000\b", text)) == 1
        (path / name).write_text(re.sub(r"\b2000\b", port, text), encoding="utf-8")
    (path / "port").write_text(port)
    (command,) = (block for block in blocks("sh") if re.fullmatch(r"triosspi accounts add [^\n]*\n", block))
    with terminal(command, program=["sh", "-c"], cwd=path) as user:
        for prompt in ("Password for ", "Repeat for confirmation: "):
            user.expect(prompt)
            user.type(f"{PASSWORD}\n")
        assert user.wait() == 0
    return path


@pytest.fixture
def server(directory: Path) -> Iterator[Running]:
    """`python server.py`, which answers."""
    with running("server.py", program=[sys.executable], cwd=directory) as process:
        address = ("localhost", int((directory / "port").read_text()))
        pause = threading.Event()
        for _ in range(3000):
            # It says nothing before the first client has come, so there is no line to wait for.
            try:
                socket.create_connection(address, timeout=30).close()
            except ConnectionRefusedError:
                assert process.process.poll() is None, process.err
                pause.wait(0.01)
            else:
                break
        yield process


def test_the_server_and_the_client_say_what_the_readme_says_when_run_as_shown(directory: Path, server: Running) -> None:
    for _ in range(2):
        done = run("client.py", program=[sys.executable], cwd=directory, env={"TRIOSSPI_PASSWORD": PASSWORD})
        assert (done.returncode, done.stdout, done.stderr) == (0, "HELLO\n", "")
    server.expect(r"\A(DOM\\alice has logged in by NTLM\n){2}\Z")
    # Who has not been added stays outside, and takes nobody along.
    done = run("client.py", program=[sys.executable], cwd=directory, env={"TRIOSSPI_PASSWORD": "wrong"})
    assert done.returncode == 1
    assert "login probably refused" in done.stderr
    done = run("client.py", program=[sys.executable], cwd=directory, env={"TRIOSSPI_PASSWORD": PASSWORD})
    assert done.stdout == "HELLO\n"
    assert server.out.count("\n") == 3


def test_the_dotnet_client_prints_what_the_readme_says_when_run_as_shown(directory: Path) -> None:
    require_nothing(csharp.available())
    (source,) = blocks("csharp")
    assert len([line for line in source.splitlines() if line.strip(" {}")]) <= 10
    (directory / "client.cs").write_text(source, encoding="utf-8")
    (command,) = (line for block in blocks("sh") for line in block.splitlines() if "--wire negotiate-stream" in line)
    assert "--port 2000" in command
    words = shlex.split(command.replace("--port 2000", "--port 0"))
    with running(*words[1:], "--host", "127.0.0.1", cwd=directory) as server:
        client = csharp.command(directory / "client.cs")
        arguments = ["127.0.0.1", str(server.expect_port()), "alice", PASSWORD, "DOM"]
        done = run(*client[1:], *arguments, program=client[:1], cwd=directory)
    assert (done.returncode, done.stdout) == (0, "Hello from .NET\n"), done.stderr


def test_each_example_has_at_most_20_lines() -> None:
    examples = blocks("python")
    assert file_shown("server.py") in examples
    assert file_shown("client.py") in examples
    for example in examples:
        compile(example, "README.md", "exec")
        assert len(example.splitlines()) <= 20


def test_the_handler_of_the_readmes_server_can_be_served_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The README names `server:handler` as an example of an application for `triosspi serve`.
    assert "`server:handler`" in README
    (tmp_path / "server.py").write_text(file_shown("server.py"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "server", raising=False)
    monkeypatch.setattr(trio, "run", lambda *_: pytest.fail("importing it runs it"))
    try:
        assert load_app("server:handler").__name__ == "handler"  # type: ignore[attr-defined]
    finally:
        sys.modules.pop("server", None)


# The command line


def find_command(words: list[str]) -> tuple[list[click.Command], list[str]]:
    """The commands that a line of the synopsis is about, and what follows their names."""
    command: click.Command = cli.cli
    while isinstance(command, click.Group):
        names, *words = words
        if "|" in names:
            return [command.commands[name] for name in names.split("|")], words
        command = command.commands[names]
    return [command], words


def synopsis() -> Iterator[str]:
    """The lines of the README's block that shows every command, each with what belongs to it."""
    (block,) = (block for block in blocks("sh") if "triosspi connect HOST" in block)
    yield from re.sub(r"\n +", " ", block).splitlines()


def test_the_synopsis_shows_every_command() -> None:
    shown = {id(command) for line in synopsis() for command in find_command(line.split()[1:])[0]}
    groups: list[click.Group] = [cli.cli]
    for group in groups:
        for command in group.commands.values():
            if isinstance(command, click.Group):
                groups.append(command)
            else:
                assert id(command) in shown, command.name


@pytest.mark.parametrize("line", list(synopsis()), ids=lambda line: " ".join(re.findall(r"^triosspi( \S+){1,2}", line)))
def test_every_option_of_the_synopsis_exists_and_takes_the_values_shown(line: str) -> None:
    program, *words = line.split()
    assert program == "triosspi"
    commands, _ = find_command(words)
    for command in commands:
        options = {
            name: parameter
            for parameter in command.params
            if isinstance(parameter, click.Option)
            for name in parameter.opts
        }
        for name, values in re.findall(r"(?<![\w-])(--?[a-z][a-z0-9-]*)(?: ([a-z-]+(?:\|[a-z-]+)+))?", line):
            assert name in options, (command.name, name)
            if values:
                choices = options[name].type
                assert isinstance(choices, click.Choice)
                assert sorted(choices.choices) == sorted(values.split("|"))


def test_every_triosspi_line_that_the_readme_shows_is_understood() -> None:
    # Parsed only: what they do is tested elsewhere.
    lines = [line for block in blocks("sh") + blocks("text") for line in block.splitlines()]
    shown = [line for line in lines if re.search(r"(^|/)triosspi (serve|connect|accounts) [^\[]*$", line)]
    shown = [line for line in shown if "HOST" not in line and "FILE" not in line]
    assert len(shown) >= 2
    for line in shown:
        words = shlex.split(line, comments=True)
        start = next(number for number, word in enumerate(words) if Path(word).name == "triosspi")
        (command,), arguments = find_command(words[start + 1 :])
        command.make_context("triosspi", arguments)


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, re.MULTILINE))
    code = blocks("sh") + re.findall(r"`([^`\n]+)`", README)
    named = {target for text in code for target in re.findall(r"\bmake ([a-z][a-z-]*)", text)}
    assert {"serve", "test", "lint", "bench"} <= named
    assert named <= targets


def test_nothing_in_the_environment_decides_about_the_examples() -> None:
    # Or they would pass here, and not for the reader.
    assert not {"TRIOSSPI_PASSWORD", "KRB5_KTNAME"} & set(environment())
