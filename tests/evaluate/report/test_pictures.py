"""Strips of images and of differences: the right pixels, the right colours, a gain that is told."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from modiff.evaluate.report.document import Figure
from modiff.evaluate.report.pictures import differences, image_figures

FULL = np.full((10, 64, 64, 1), 100, np.uint8)


def pixels(figure: Figure) -> np.ndarray:
    with Image.open(io.BytesIO(figure.data)) as picture:
        return np.asarray(picture.convert("RGB"))


def changed(levels: int) -> np.ndarray:
    images = FULL.copy()
    images[:, 0, 0] += np.uint8(levels)
    images[:, 32:] += np.uint8(levels)
    return images


def test_each_configuration_has_its_images_and_beside_them_its_difference() -> None:
    found = image_figures([("full", FULL), ("a", changed(8)), ("b", changed(64))], seed=3)
    assert [(f.name, f.half) for f in found] == [
        ("images-0", False), ("images-1", True), ("difference-1", True), ("images-2", True), ("difference-2", True)
    ]  # fmt: skip
    assert found[0].alt == "8 images of full, seeds 3 to 10."
    assert "Difference of a to full, enlarged 16 times; the largest is 8 of 255" in found[2].alt
    assert all(f.pixels for f in found)


def test_the_strips_show_the_images_themselves() -> None:
    strip = pixels(image_figures([("full", FULL), ("a", changed(8))], seed=0)[1])
    values, counts = np.unique(strip, return_counts=True)
    shown = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert shown[100] == 3 * 8 * (32 * 64 - 1)
    assert shown[108] == 3 * 8 * (32 * 64 + 1)
    assert set(shown) == {100, 108, 255}


def test_brighter_is_red_darker_is_blue_equal_is_white() -> None:
    images = FULL[:1].copy()
    images[0, 0, 0], images[0, 0, 1] = 228, 0
    _, colours = differences(images, FULL[:1])
    gain = differences(images, FULL[:1])[0]
    assert gain == 1
    assert colours[0, 0, 0] == pytest.approx([1, 1 - 128 / 255, 1 - 128 / 255])
    assert colours[0, 0, 1] == pytest.approx([1 - 100 / 255, 1 - 100 / 255, 1])
    assert (colours[0, 1:] == 1).all()


@pytest.mark.parametrize(("levels", "gain"), [(1, 128), (2, 64), (8, 16), (127, 2), (128, 1), (155, 1)])
def test_the_gain_is_the_largest_power_of_two_that_does_not_saturate(levels: int, gain: int) -> None:
    assert differences(changed(levels), FULL)[0] == gain


def test_a_few_loud_pixels_do_not_hide_the_rest() -> None:
    images = FULL.copy()
    images += 2
    images[:, 0, 0] = 255
    assert differences(images, FULL)[0] == 64


def test_equal_images_have_gain_one_and_are_white() -> None:
    gain, colours = differences(FULL, FULL)
    assert gain == 1
    assert (colours == 1).all()


def test_colour_images_are_compared_by_the_mean_of_their_channels() -> None:
    colour = np.repeat(FULL[:1], 3, axis=-1)
    other = colour.copy()
    other[..., 0] += 3
    gain, colours = differences(other, colour)
    assert (gain, colours.shape) == (128, (1, 64, 64, 3))
    assert colours[0, 0, 0, 2] == pytest.approx(1 - 128 / 255)
