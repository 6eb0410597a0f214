"""Images as extractors take them, features of a set in order, and weights files that are checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.features.extractor import Features, check_images, extract
from tests.evaluate.features.images import noise


class Recorder:
    """Hands pixels on, notes its batches, and leaves out what is not asked for."""

    name, dimension = "recorder", 12

    def __init__(self, places: bool = True) -> None:
        self.sizes: list[int] = []
        self.places = places

    def __call__(self, images: Tensor) -> Features:
        self.sizes.append(len(images))
        rows = images.flatten(1).float()
        return Features(rows, rows * 2 if self.places else None, None)


IMAGES = noise(0, 11, 2, 2, 3)
PIXELS = IMAGES.flatten(1).float()


def test_all_images_come_in_order_from_batches_of_any_size() -> None:
    recorder = Recorder()
    batches = [IMAGES[:1].numpy(), IMAGES[1:8].numpy(), IMAGES[8:]]
    features = extract(recorder, iter(batches), batch_size=3)
    assert recorder.sizes == [1, 3, 3, 1, 3]
    assert torch.equal(features.pooled, PIXELS)
    assert torch.equal(features.spatial, PIXELS * 2)
    assert features.probabilities is None


def test_no_images_are_an_error() -> None:
    with pytest.raises(ConfigError, match="extract: expected images, got none"):
        extract(Recorder(), [])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 4, 5, 3), np.uint8), r"here: expected a tensor of uint8 images \(N, H, W, 1 or 3\), got ndarray"),
        (torch.zeros(1, 4, 5, 3), "torch.float32"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), r"got \(1, 3, 4, 5\)"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"got \(4, 5, 3\)"),
        (torch.zeros(0, 4, 5, 3, dtype=torch.uint8), r"got \(0, 4, 5, 3\)"),
    ],
)
def test_anything_else_is_refused(images: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_images(images, "here")
