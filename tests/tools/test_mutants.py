"""The mutation run: each fault changes one place, the mirrored tests judge it, and what was judged is kept."""

import ast
import json
import sys
from pathlib import Path

import mutants
from mutants import mutants_of
from mutants import tests_of as judges

SOURCE = '''
def clip(x: int = 0, *, high=2) -> int:
    """Docs: 1 + 1."""
    if x is None or not high >= 1:
        raise ValueError(f"expected {1 + 1}, got {x + 1}")
    return min(x - 1, high)
'''


def test_each_fault_is_a_program_that_differs_in_one_place_outside_of_messages():
    found = list(mutants_of("a.py", SOURCE))
    programs = {ast.unparse(ast.parse(mutant.apply(SOURCE))) for mutant in found}
    assert len(programs) == len(found)
    assert ast.unparse(ast.parse(SOURCE)) not in programs
    assert {m.after for m in found} >= {"x is not None", "high >= 1", "high > 1", "x + 1", "return None"}
    assert all("Docs: 1 + 1." in mutant.apply(SOURCE) for mutant in found)
    assert not [m for m in found if SOURCE.splitlines()[m.line - 1].strip().startswith("raise")]


def test_a_module_is_judged_by_its_mirrored_tests_or_by_those_of_its_folder():
    assert judges("src/modiff/core/affine.py") == ["tests/core/test_affine.py"]
    assert judges("src/modiff/checkpoint/no_such_module.py") == ["tests/checkpoint"]
    assert judges("src/modiff/checkpoint/no_such_folder/module.py") == ["tests/checkpoint"]


def test_results_are_kept_fault_by_fault_and_not_judged_twice(tmp_path, monkeypatch, capsys):
    judged: list[str] = []

    def killed(mutant: mutants.Mutant, copy: Path) -> bool:
        assert (copy / mutant.path).is_file()
        judged.append(mutant.key)
        return len(judged) != 2

    monkeypatch.setattr(mutants, "killed", killed)
    results = tmp_path / "results.json"
    words = ["mutants", "checkpoint", "--count", "3", "--seed", "4", "--jobs", "1", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", words)
    assert mutants.main() == 0
    shown = capsys.readouterr().out
    assert "2 of 3 killed" in shown
    assert judged[1] in shown
    assert [entry["killed"] for entry in json.loads(results.read_text()).values()] == [True, False, True]
    assert mutants.main() == 0
    assert len(judged) == 3
    assert capsys.readouterr().out == shown
