"""The check of a wheel: files that are no part of the package, and its size."""

import zipfile
from pathlib import Path

import pytest

from tools import wheel as tool


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (["modiff/api.py", "modiff-0.1.0.dist-info/METADATA"], []),
        (["modiff/api.py", "tests/test_api.py", "bench/x.py"], ["bench/: expected no", "tests/: expected no"]),
    ],
)
def test_a_wheel_holds_the_package_alone(names: list[str], wrong: list[str], tmp_path: Path) -> None:
    with zipfile.ZipFile(path := tmp_path / "modiff.whl", "w") as file:
        for name in names:
            file.writestr(name, "")
    assert [line.partition(" such")[0] for line in tool.problems(path)] == wrong


def test_a_wheel_that_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "LARGEST", 10)
    with zipfile.ZipFile(path := tmp_path / "modiff.whl", "w") as file:
        file.writestr("modiff/api.py", "x")
    assert "modiff.whl: expected at most 10 bytes, got " in tool.problems(path)[0]
