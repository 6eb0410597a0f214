"""The scripts and notebooks of examples/ run as they stand: without arguments and without a network."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.timeout(600)  # half a minute of one core, and a busy machine
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_is_stored_with(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    from notebooks import executed, nbformat  # both come with nbclient

    def kinds(notebook: "nbformat.NotebookNode") -> list[list[str]]:
        return [[output.output_type for output in cell.get("outputs", ())] for cell in notebook.cells]

    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert kinds(executed(path, tmp_path)) == kinds(stored), "python tools/notebooks.py keeps what they show now"
    assert path.stat().st_size < 150_000
    assert str(Path.home()) not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["examples/README.md", "docs/examples.md"])
def test_every_script_and_notebook_is_on_the_page(page: str) -> None:
    shown = re.findall(r"(\w+\.(?:py|ipynb))[)>\n]", (ROOT / page).read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(path.name for path in [*EXAMPLES, *NOTEBOOKS])
