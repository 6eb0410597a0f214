"""Where the package keeps its data, and what it says when it was installed without."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from modiff import assets
from modiff.errors import FormatError

FOLDERS = [
    (assets.embedded_folder, "fashion_mnist", "model_index.json"),
    (assets.classifier_folder, "fashion_mnist_classifier", "config.json"),
    (partial(assets.model_folder, "cifar10"), "cifar10", "model_index.json"),
    (partial(assets.classifier_folder, "cifar10"), "cifar10_classifier", "config.json"),
]


@pytest.mark.parametrize(("folder", "name", "landmark"), FOLDERS)
def test_a_folder_beside_the_module_is_found(
    folder: Callable[[], Path], name: str, landmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "files", {"modiff.assets": tmp_path}.__getitem__)
    (tmp_path / name).mkdir()
    (tmp_path / name / landmark).write_text("{}")
    assert folder() == tmp_path / name


@pytest.mark.parametrize(("folder", "name", "landmark"), FOLDERS)
@pytest.mark.parametrize("empty", [False, True], ids=["no folder", "an empty folder"])
def test_a_package_without_its_data_is_named(
    folder: Callable[[], Path], name: str, landmark: str, empty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "files", {"modiff.assets": tmp_path}.__getitem__)
    if empty:
        (tmp_path / name).mkdir()
    with pytest.raises(FormatError, match=rf"expected {name}/{landmark} in the package.*make_assets\.py"):
        folder()


def test_another_name_is_refused_with_the_known_ones() -> None:
    for folder in (assets.model_folder, assets.classifier_folder):
        with pytest.raises(FormatError, match="expected one of embedded, cifar10, got 'imagenet'"):
            folder("imagenet")
