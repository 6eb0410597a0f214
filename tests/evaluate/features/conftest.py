"""What the tests of extractors share."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.evaluate.features.inception_weights import drawn


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of the public layout with drawn weights."""
    path = tmp_path_factory.mktemp("inception") / "drawn.safetensors"
    save_file(drawn(), path)
    return path
