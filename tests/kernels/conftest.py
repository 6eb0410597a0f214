"""Compiled libraries of these tests go to a folder of this run: built once, and never in the user's cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from modiff.kernels import native


@pytest.fixture(scope="session", autouse=True)
def _libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.CACHE, str(tmp_path_factory.mktemp("libraries")))
        native.load.cache_clear()
        yield
        native.load.cache_clear()
