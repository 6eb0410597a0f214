"""The resize of TensorFlow 1: pixel by pixel, its lopsided alignment, and where it agrees with torch's."""

from __future__ import annotations

import pytest
import torch

from modiff.evaluate.features.tensorflow_resize import tensorflow_resize
from tests.reference import metrics as reference


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 13), (9, 8, 4), (6, 6, 6), (1, 3, 5)])
def test_it_agrees_with_a_pixel_at_a_time(height: int, width: int, size: int) -> None:
    image = torch.rand(height, width, dtype=torch.float64)
    expected = reference.tensorflow_resize(image.numpy(), size)
    found = tensorflow_resize(image[None, None], size)[0, 0]
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_equal_size_leaves_every_pixel() -> None:
    image = torch.rand(2, 3, 299, 299)
    assert torch.equal(tensorflow_resize(image, 299), image)


def test_it_starts_at_the_first_pixel_and_repeats_the_last_one() -> None:
    row = tensorflow_resize(torch.arange(4.0).expand(1, 1, 4, 4), 16)[0, 0, 0]
    assert row.tolist() == [*(i / 4 for i in range(13)), 3, 3, 3]  # torch's would be centred: 0, 0, 1/8, ...


def test_images_do_not_mix() -> None:
    images = torch.rand(3, 2, 5, 6)
    assert torch.equal(tensorflow_resize(images, 9)[1:2, 1:2], tensorflow_resize(images[1:2, 1:2], 9))
