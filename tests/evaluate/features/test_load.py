"""Extractors by name, and names of results: FID only with Inception."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modiff.errors import FormatError
from modiff.evaluate.features.classifier import Classifier, save_classifier
from modiff.evaluate.features.load import load_extractor
from tests.evaluate.features.images import noise


def test_the_packages_own_and_a_folder_of_ones_own(tmp_path: Path) -> None:
    extractor = load_extractor("classifier")
    features = extractor(noise(4, 3, 28, 28, 1))
    assert (extractor.name, extractor.dimension) == ("fashion-mnist-classifier", 128)
    assert [tuple(rows.shape) for rows in features] == [(3, 128), (3, 7 * 7 * 7), (3, 10)]
    torch.testing.assert_close(features.probabilities.sum(1), torch.ones(3))
    save_classifier(Classifier(channels=(4, 8), classes=3), tmp_path / "mine")
    extractor = load_extractor(str(tmp_path / "mine"))
    assert (extractor.name.rpartition("-")[0], extractor.dimension) == ("mine", 8)


def test_anything_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="inception: expected 'classifier', a classifier's folder"):
        load_extractor("inception")
    with pytest.raises(FormatError, match=r"config\.json"):
        load_extractor(str(tmp_path))
