"""Images as extractors take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modiff.errors import ConfigError
from modiff.evaluate.features.protocol import check_images


def test_grey_and_colour_bytes_are_taken() -> None:
    for channels in (1, 3):
        check_images(torch.zeros(1, 4, 5, channels, dtype=torch.uint8), "here")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 4, 5, 3), np.uint8), r"here: expected a uint8 tensor \(N, H, W, C\), got ndarray"),
        (torch.zeros(1, 4, 5, 3), "torch.float32"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), r"got \(1, 3, 4, 5\)"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"got \(4, 5, 3\)"),
        (torch.zeros(0, 4, 5, 3, dtype=torch.uint8), r"got \(0, 4, 5, 3\)"),
    ],
)
def test_anything_else_is_refused(images: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_images(images, "here")
