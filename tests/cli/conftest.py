"""A saved pipeline that tests only read."""

from pathlib import Path

import pytest

from tests.pixels import saved_pipeline


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_pipeline(tmp_path_factory.mktemp("models") / "pipeline")
