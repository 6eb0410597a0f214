"""Extractors by name, images as they take them, and features of several batches as those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features.classifier import Classifier, save_classifier
from modiff.evaluate.features.extractor import Features, check_images, joined
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


def test_batches_are_joined_in_order_and_what_one_lacks_is_left_out() -> None:
    rows = torch.arange(12.0).reshape(6, 2)
    parts = [Features(rows[:1], rows[:1] * 2, rows[:1]), Features(rows[1:], rows[1:] * 2, None)]
    features = joined(parts)
    assert torch.equal(features.pooled, rows)
    assert torch.equal(features.spatial, rows * 2)
    assert features.probabilities is None


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (4, 5, 3), (0, 4, 5, 3), (1, 4, 5, 3)], ids=str)
def test_anything_but_byte_images_is_refused(shape: tuple[int, ...]) -> None:
    images = torch.zeros(shape, dtype=torch.float32 if shape == (1, 4, 5, 3) else torch.uint8)
    with pytest.raises(ConfigError, match=r"here: expected uint8 images \(N, H, W, 1 or 3\), got"):
        check_images(images, "here")
