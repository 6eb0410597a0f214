"""Images as extractors take them, and features of several batches as those of one."""

from __future__ import annotations

import pytest
import torch

from modiff.errors import ConfigError
from modiff.evaluate.features.extractor import Features, check_images, joined


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
