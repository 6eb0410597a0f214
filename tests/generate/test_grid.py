"""The grid: every image where it belongs, labels beside, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from modiff.errors import ConfigError
from modiff.generate.grid import GAP, SMALLEST, grid, to_picture


def flat(values: list[float], side: int = SMALLEST, channels: int = 1) -> np.ndarray:
    """Images of one grey each."""
    return np.broadcast_to(np.array(values)[:, None, None, None], (len(values), side, side, channels))


def tile(picture: Image.Image, row: int, column: int, columns: int, side: int = SMALLEST) -> np.ndarray:
    """The pixels where an image must be, counted from the right and the top."""
    right = picture.width - GAP - (columns - 1 - column) * (side + GAP)
    top = GAP + row * (side + GAP)
    return np.asarray(picture.crop((right - side, top, right, top + side)))


def test_every_image_sits_in_its_row_and_column() -> None:
    picture = grid([("a", flat([0.0, 0.2, 0.4])), ("b", flat([0.6, 0.8, 1.0]))])
    assert picture.mode == "RGB"
    for row in range(2):
        for column in range(3):
            expected = round(255 * 0.2 * (3 * row + column))
            assert np.all(tile(picture, row, column, 3) == expected), (row, column)


def test_small_images_grow_by_a_whole_factor_and_each_pixel_stays_a_square() -> None:
    image = np.zeros((1, 8, 8, 1))
    image[0, 0, 7, 0] = 1
    found = tile(grid([("", image)]), 0, 0, 1)
    assert found.shape == (SMALLEST, SMALLEST, 3)
    assert np.all(found[:8, -8:] == 255)
    assert found.sum() == 8 * 8 * 3 * 255


def test_images_larger_than_the_smallest_side_keep_their_size() -> None:
    assert grid([("", flat([0.0], side=100))]).height == 100 + 2 * GAP


def test_colours_keep_their_order() -> None:
    image = np.zeros((1, SMALLEST, SMALLEST, 3))
    image[..., 0], image[..., 2] = 1.0, 0.2
    assert np.all(tile(grid([("", image)]), 0, 0, 1) == (255, 0, 51))


def test_a_label_is_written_beside_its_row_and_never_on_an_image() -> None:
    long = "a label that is longer than others"
    picture = grid([("", flat([1.0])), (long, flat([1.0]))])
    left = np.asarray(picture)[:, : picture.width - SMALLEST - GAP]
    assert np.all(left[: SMALLEST + GAP] == 255)
    assert np.any(left[SMALLEST + 2 * GAP :] < 128)
    assert np.all(tile(picture, 1, 0, 1) == 255)
    assert picture.width > grid([("short", flat([1.0]))]).width


def test_values_round_to_nearest_and_clip_and_nan_is_black() -> None:
    values = np.array([[-1.0, 0.5 / 255 - 1e-6, 0.5 / 255 + 1e-6, 2.0, np.nan]])[..., None]
    assert np.asarray(to_picture(values)).tolist() == [[0, 0, 1, 255, 0]]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [("a", np.zeros((0, 8, 8, 1)))],
        [("a", np.zeros((1, 8, 8)))],
        [("a", np.zeros((1, 8, 8, 4)))],
        [("a", np.zeros((2, 8, 8, 1))), ("b", np.zeros((1, 8, 8, 1)))],
    ],
)
def test_rows_that_make_no_grid_are_an_error(rows: list[tuple[str, np.ndarray]]) -> None:
    with pytest.raises(ConfigError, match="rows of images"):
        grid(rows)
