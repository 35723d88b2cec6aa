"""CONTRIBUTING.md, the Makefile and pre-commit's configuration say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import triosspi

yaml = pytest.importorskip("yaml", reason="no PyYAML")

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def recipe(target: str) -> list[str]:
    """The commands of a target, with the variables that name the environment's programs filled in."""
    found = re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", MAKEFILE, re.MULTILINE)
    assert found, f"the Makefile has no {target}"
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def test_pre_commit_runs_what_make_lint_runs():
    """A hook that is more lenient than CI, or stricter, would be switched off by whoever meets the difference."""
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repo,) = configuration["repos"]
    assert repo["repo"] == "local"  # of the project's environment: other repositories would bring other versions
    assert [hook["entry"] for hook in repo["hooks"]] == recipe("lint")
    for hook in repo["hooks"]:
        # The whole tree, as in CI: mypy judges a file by those that use it.
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)


def test_every_target_and_file_that_contributors_are_sent_to_is_there():
    prose = re.sub(r"^ *```.*?^ *```", "", CONTRIBUTING, flags=re.MULTILINE | re.DOTALL)
    targets = {
        word for code in re.findall(r"`make ([^`]+)`", prose) for word in code.split() if re.fullmatch(r"[a-z-]+", word)
    }
    targets |= set(re.findall(r"^ *make ([a-z-]+)", CONTRIBUTING, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony
    assert targets
    assert targets <= set(phony[1].split())
    linked = re.findall(r"\]\(([^)]+)\)", CONTRIBUTING)
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_the_version_is_the_same_wherever_it_stands():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert triosspi.__version__ == version
    assert f"triosspi:{version}\n" in (ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(version)} \(", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
