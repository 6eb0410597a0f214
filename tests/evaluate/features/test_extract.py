"""Features of a set: in order, whatever the batches are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.features.extract import extract
from modiff.evaluate.features.protocol import Features
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
    found = extract(recorder, iter(batches), batch_size=3)
    assert recorder.sizes == [1, 3, 3, 1, 3]
    assert torch.equal(found.pooled, PIXELS)
    assert torch.equal(found.spatial, PIXELS * 2)
    assert found.probabilities is None


def test_what_the_extractor_does_not_give_is_none() -> None:
    assert extract(Recorder(places=False), [IMAGES]).spatial is None


def test_no_images_are_an_error() -> None:
    with pytest.raises(ConfigError, match="extract: expected images, got none"):
        extract(Recorder(), [])
