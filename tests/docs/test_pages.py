"""The code of the pages: blocks marked python run from top to bottom, py ones and commands are as modiff has them."""

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import typer

from modiff.cli import app
from tests.docs.pages import blocks, broken_links, commands, wrong_names

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
ELSEWHERE = {"README.md": "tests/test_rooms.py", "docs/extending.md": "tests/seams/test_page.py"}
"""Pages whose blocks another test runs: one by one, or in a process that what they register does not outlive."""
RUN = [name for name, text in TEXTS.items() if blocks(text, "python") and name not in ELSEWHERE]


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace, as a reader types it; in a folder that holds nothing, without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, object] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(TEXTS[name], "python"):
            torch.manual_seed(0)
            exec(compile(block, name, "exec"), names)


@pytest.mark.parametrize("name", TEXTS)
def test_what_a_page_says_of_modiff_is_there_and_takes_these_arguments(name: str) -> None:
    assert list(wrong_names(blocks(TEXTS[name], "python", "py"))) == []


def options_of(words: list[str]) -> str:
    """What is wrong with a command of modiff; empty where it parses."""
    known = cast(Any, typer.main.get_command(app)).commands
    if not words or words[0].startswith("-"):
        return ""
    if words[0] not in known:
        return f"no command {words[0]}"
    command = known[words[0]]
    try:
        command.make_parser(command.context_class(command, info_name=words[0])).parse_args(words[1:])
    except typer.exceptions.TyperException as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", TEXTS)
def test_the_commands_of_a_page_exist_with_their_options(name: str) -> None:
    for line in commands(TEXTS[name]):
        words = shlex.split(line, comments=True) if re.match(r"(modiff|python) ", line) else []
        if words[:1] == ["modiff"]:
            assert options_of(words[1:]) == "", line
        elif words[:1] == ["python"] and words[1].endswith(".py") and "/" in words[1]:
            assert (ROOT / words[1]).exists(), line


LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md", *ROOT.glob("examples/notebooks/*.ipynb")]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_to_a_file_and_a_heading_of_the_repository(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


PAGE = """
```py
import modiff
from modiff.presets import w8a4 as preset
modiff.apply(pipe, preset(), runs=1)
modiff.accelerates(pipe)
modiff.apply(*everything, **more)
```
- ```python
  from modiff import nothing
  modiff.presets.plain(8, 4, 2)
  ```
```text
modiff.no()
```
```console
$ modiff demo --no-such-option \\
  --steps 3
not a command
```
"""


def test_what_reads_the_pages_sees_what_is_wrong() -> None:
    wrong = list(wrong_names(blocks(PAGE.replace("- ```", "  ```"), "python", "py")))
    assert [line.partition(":")[0] for line in wrong] == [
        "modiff.apply",
        "modiff.accelerates",
        "modiff",
        "modiff.presets.plain",
    ]
    assert "runs" in wrong[0]
    assert commands(PAGE) == ["modiff demo --no-such-option    --steps 3"]
    assert "no-such-option" in options_of(["demo", "--no-such-option"])
    assert options_of(["dance"]) == "no command dance"
    assert options_of(["demo", "--steps", "3"]) == ""


def test_what_reads_the_links_sees_what_is_broken(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `code`\n```text\n# not a heading\n[a](b.md)\n```\n")
    text = "[a](no.md) [b](page.md) [c](#one-code) [d](page.md#not-a-heading) [e](https://f.g/h#i) ![j](k.png)"
    assert broken_links(page, text) == ["no.md", "page.md#not-a-heading", "k.png"]
