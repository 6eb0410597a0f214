"""Folders of a small pipeline, in floats and quantized; tests read them or change a copy."""

import pytest

import modiff
from modiff import presets
from tests.hosts.tiny import SMALL


@pytest.fixture(scope="session")
def floats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats") / "pipe"
    SMALL.build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized(tmp_path_factory):
    """W4A8."""
    folder, pipe = tmp_path_factory.mktemp("quantized") / "pipe", SMALL.build()
    modiff.apply(pipe, presets.w4a8())
    modiff.save(pipe, folder)
    return folder
