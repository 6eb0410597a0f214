"""The runner of deliberate bugs: its table fits the code, and it tells a killed bug from one that survived."""

from __future__ import annotations

from pathlib import Path

import pytest

import mutate
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]

CODE = "def double(x):\n    return 2 * x\n\n\ndef untested(x):\n    return x + 1\n"
TEST = "from toy_for_mutation import double\n\n\ndef test_double():\n    assert double(3) == 6\n"


def bug(old: str, new: str, test: str = "tests/test_toy.py") -> Mutation:
    """A bug in the toy package."""
    return Mutation(file="src/toy_for_mutation.py", old=old, new=new, tests=(test,), why="toy")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one module, half of which is tested; its tests need no plugins, so they start fast."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "src").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "src/toy_for_mutation.py").write_text(CODE)
    (tmp_path / "tests/test_toy.py").write_text(TEST)
    return tmp_path


@pytest.mark.parametrize("number", range(len(MUTATIONS)))
def test_a_bug_can_still_be_planted_and_its_tests_exist(number: int) -> None:
    mutation = MUTATIONS[number]
    mutate.mutated((ROOT / mutation.file).read_text(encoding="utf-8"), mutation)
    assert mutation.tests
    assert all((ROOT / test.partition("::")[0]).is_file() for test in mutation.tests)
    assert mutation.why


def test_a_tested_bug_is_killed_and_an_untested_one_is_reported(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [bug("2 * x", "3 * x"), bug("x + 1", "x - 1")]
    assert mutate.main([], root=toy, table=table) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["killed", "0"], ["SURVIVED", "1"]]
    assert lines[2] == "1 of 2 killed"
    assert (toy / "src/toy_for_mutation.py").read_text() == CODE


def test_all_killed_is_success(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [bug("x + 1", "x - 1"), bug("2 * x", "3 * x")]
    assert mutate.main(["--only", "1"], root=toy, table=table) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 1 killed"


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (bug("return", "yield"), "expected 'return' once, got it 2 times"),
        (bug("nowhere", "x"), "expected 'nowhere' once, got it 0 times"),
        (bug("2 * x", "2 * x"), "expected a change"),
        (bug("return 2 * x", "return 2 *"), "expected tests that run, got pytest's exit code 2"),
    ],
)
def test_a_bug_that_proves_nothing_is_an_error(
    toy: Path, mutation: Mutation, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutate.main([], root=toy, table=[mutation]) == 2
    assert message in capsys.readouterr().err


def test_tests_that_fail_without_a_bug_are_an_error(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "tests/test_toy.py").write_text(TEST.replace("6", "7"))
    assert mutate.main([], root=toy, table=[bug("2 * x", "3 * x")]) == 2
    assert "expected a pass without a bug" in capsys.readouterr().err


def test_an_empty_table_is_an_error(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate.main([], root=toy, table=[]) == 2
    assert "expected bugs, got none" in capsys.readouterr().err


def test_the_list_names_every_bug_and_an_unknown_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate.main(["--list"], table=[bug("a", "b"), bug("c", "d")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(SystemExit, match="2"):
        mutate.main(["--only", "2"], table=[bug("a", "b"), bug("c", "d")])
    assert "expected a number below 2, got 2" in capsys.readouterr().err
