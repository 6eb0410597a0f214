"""The folder of a study: whole files, one study, clear words for anything else."""

from pathlib import Path

import pytest

from experiments.store import Store
from modiff.errors import ConfigError, FormatError


def test_what_is_saved_is_there_for_the_next_study(tmp_path: Path) -> None:
    store = Store(tmp_path / "new", {"seed": 1})
    assert store.run("abc") is None
    assert store.experiment("table4") is None
    store.save_run("abc", {"errors": [1.0]})
    store.save_experiment("table4", {"values": {"rows": []}})
    again = Store(tmp_path / "new", {"seed": 1})
    assert again.run("abc") == {"errors": [1.0]}
    assert again.experiment("table4") == {"values": {"rows": []}}
    assert again.run("table4") is None


def test_another_study_and_other_files_are_refused_and_kept(tmp_path: Path) -> None:
    Store(tmp_path / "a", {"seed": 1, "steps": 5})
    with pytest.raises(ConfigError, match="got another seed and steps"):
        Store(tmp_path / "a", {"seed": 2, "steps": 6})
    Store(tmp_path / "a", {"seed": 1, "steps": 5})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        Store(tmp_path / "b", {"seed": 1})
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path, {"seed": 1})
    store.save_run("abc", {"errors": [1.0]})
    (tmp_path / "runs" / "abc.json").write_text(text)
    with pytest.raises(FormatError, match=r"abc\.json.*Delete it"):
        store.run("abc")
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(FormatError, match=r"study\.json"):
        Store(tmp_path, {"seed": 1})
