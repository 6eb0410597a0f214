"""README keeps its word: every Python block runs, every make target it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from readme_table import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(*languages: str) -> list[str]:
    """The bodies of the fenced blocks of these languages."""
    fence = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
    return [body for language, body in fence.findall(README) if language in languages]


@pytest.mark.parametrize("source", blocks("python"), ids=lambda source: source.splitlines()[0])
def test_a_python_block_runs_as_printed(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(source, "README.md", "exec"), names)
    assert "modiff" in names or "pipe" in names  # a block that imports nothing shows nothing


def test_the_make_targets_of_readme_exist_and_the_two_commands_are_among_them() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    defined = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    calls = re.findall(r"^\s*(?:\$ )?make\b([^#\n]*)", "\n".join(blocks("bash", "sh", "console")), re.MULTILINE)
    named = {word for call in calls for word in call.split() if re.fullmatch(r"[a-z][\w-]*", word)}
    assert {"demo", "test"} <= named <= defined


def test_the_table_of_readme_is_the_one_of_the_committed_run() -> None:
    result = json.loads((ROOT / "docs/results/demo.json").read_text(encoding="utf-8"))
    assert table(result) in README
