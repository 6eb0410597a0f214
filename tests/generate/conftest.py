"""A saved pipeline and a folder of eleven images without a model; both are only read."""

from pathlib import Path

import pytest

from tests.generate.fakes import run
from tests.pixels import saved_pipeline


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    run(tmp_path / "images")
    return tmp_path / "images"
