"""Optional packages: missing, broken, and the torchvision that was built for another torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from modiff.errors import ConfigError
from modiff.evaluate.features.optional import optional_import


def package(folder: Path, name: str, source: str, patch: pytest.MonkeyPatch) -> str:
    (folder / f"{name}.py").write_text(source)
    patch.syspath_prepend(folder)
    return name


def test_a_package_that_is_there_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert optional_import(package(tmp_path, "modiff_fine", "x = 3", monkeypatch), "here").x == 3


def test_a_missing_package_says_what_to_type() -> None:
    with pytest.raises(ConfigError, match=r"Here: expected the package nothing_there, .* pip install 'modiff\[eval\]'"):
        optional_import("nothing_there", "Here")


def test_a_package_whose_own_import_is_missing_names_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = package(tmp_path, "modiff_needy", "import nothing_there", monkeypatch)
    with pytest.raises(ConfigError, match="expected the package nothing_there"):
        optional_import(name, "Here")


def test_a_torchvision_of_another_torch_says_how_to_get_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "raise RuntimeError('operator torchvision::nms does not exist\\nand more')"
    name = package(tmp_path, "modiff_trap", source, monkeypatch)
    with pytest.raises(ConfigError, match=r"RuntimeError: operator torchvision::nms .* in one command with torch"):
        optional_import(name, "Here")


def test_a_package_broken_otherwise_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = package(tmp_path, "modiff_broken", "raise OSError('libcudart.so.12: no such file')", monkeypatch)
    with pytest.raises(ConfigError, match=r"expected modiff_broken to load, got OSError: libcudart.* pip install"):
        optional_import(name, "Here")
