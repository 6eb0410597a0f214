"""Where the package keeps its data, and what it says when it was installed without."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from modiff import assets
from modiff.errors import FormatError

FOLDERS = [
    (assets.model_folder, "embedded", "fashion_mnist/model_index.json"),
    (assets.classifier_folder, "embedded", "fashion_mnist_classifier/config.json"),
    (assets.model_folder, "cifar10", "cifar10/model_index.json"),
    (assets.classifier_folder, "cifar10", "cifar10_classifier/config.json"),
    (lambda _: assets.text_folder(), "", "king_james/model_index.json"),
]


@pytest.mark.parametrize(("folder", "name", "landmark"), FOLDERS)
def test_a_folder_next_to_the_module_is_returned_and_a_package_without_its_data_is_named(
    folder: Callable[[str], Path], name: str, landmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "files", {"modiff.assets": tmp_path}.__getitem__)
    for make in (lambda: None, (tmp_path / landmark).parent.mkdir):
        make()
        with pytest.raises(FormatError, match=rf"expected {landmark} in the package.*training/\w+\.py"):
            folder(name)
    (tmp_path / landmark).write_text("{}")
    assert folder(name) == (tmp_path / landmark).parent


def test_another_name_is_refused_with_the_known_ones() -> None:
    for folder in (assets.model_folder, assets.classifier_folder):
        with pytest.raises(FormatError, match="expected one of embedded, cifar10, got 'imagenet'"):
            folder("imagenet")


def test_no_file_of_the_package_names_a_folder_of_the_machine_that_made_it() -> None:
    texts = [path for path in Path(assets.__file__).parent.rglob("*") if path.suffix in (".json", ".md")]
    assert texts
    assert [path.name for path in texts if re.search(r"[\"' =]/\w+/", path.read_text(encoding="utf-8"))] == []
