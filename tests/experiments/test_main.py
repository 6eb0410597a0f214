"""`python -m experiments`: findings are printed and written, and mistakes come before the model is loaded."""

import json
from pathlib import Path

import pytest

from experiments.__main__ import main
from tests.pixels import saved_pipeline


def test_it_prints_each_finding_and_writes_figures_page_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, docs = str(saved_pipeline(tmp_path / "model")), tmp_path / "out", tmp_path / "docs"
    words = ["figure1b", "--model", model, "-o", str(out), "--steps", "10", "-n", "1", "--docs", str(docs)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "Distribution of activations and temporal differences (figure 1b)" in printed
    assert list(json.loads((out / "results.json").read_text())["experiments"]) == ["figure1b"]
    command = f"python -m experiments figure1b --model {model} --preset quick --steps 10 -n 1"
    for page in (out / "report.html", out / "report.md", docs / "study.md"):
        assert command in page.read_text()
    assert (docs / "figures" / "study-figure1b.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["figure9"], "got figure9. Use for example: python -m experiments figure1a table4."),
        (["all", "--steps", "4"], "StudySettings.steps: expected 10 or more steps, got 4."),
    ],
)
def test_a_mistake_is_one_line_and_costs_no_loading(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--model", "no such model", "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
