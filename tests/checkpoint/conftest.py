"""A quantized module in a folder."""

from pathlib import Path

import pytest

import modiff
from modiff import presets
from tests.model.toys import toy


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = toy()
    modiff.apply(model, presets.w4a8())
    modiff.save(model, tmp_path / "saved")
    return tmp_path / "saved"
