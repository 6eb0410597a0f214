"""README keeps its word: every Python block runs, every make target it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from readme_table import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELLS = ("bash", "sh", "shell", "console")


def blocks(text: str, *languages: str) -> list[str]:
    """The bodies of the fenced blocks of these languages."""
    fence = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
    return [body for language, body in fence.findall(text) if language in languages]


def make_targets(text: str) -> list[str]:
    """The targets of every `make ...` line, options and variables left out."""
    calls = re.findall(r"^\s*(?:\$ )?make\b([^#\n]*)", text, re.MULTILINE)
    return [word for call in calls for word in call.split() if re.fullmatch(r"[a-z][\w-]*", word)]


@pytest.mark.parametrize("source", blocks(README, "python"), ids=lambda source: source.splitlines()[0])
def test_a_python_block_runs_as_printed(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(source, "README.md", "exec"), names)
    assert "modiff" in names or "pipe" in names  # a block that imports nothing shows nothing


def test_readme_shows_python_and_the_two_commands() -> None:
    assert blocks(README, "python")
    assert {"demo", "test"} <= {target for block in blocks(README, *SHELLS) for target in make_targets(block)}


def test_the_make_targets_of_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    defined = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    named = {target for block in blocks(README, *SHELLS) for target in make_targets(block)}
    assert named - defined == set()


def test_the_table_of_readme_is_the_one_of_the_committed_run() -> None:
    result = json.loads((ROOT / "docs/results/demo.json").read_text(encoding="utf-8"))
    assert table(result) in README


def test_blocks_and_targets_are_read_from_the_text() -> None:
    text = "a\n```python\nx = 1\n```\nmake no\n```bash\n$ make demo ARGS=-h # make tea\nmake -n test lint-fix\n```\n"
    assert blocks(text, "python") == ["x = 1\n"]
    assert [make_targets(block) for block in blocks(text, *SHELLS)] == [["demo", "test", "lint-fix"]]
