"""The grid: every image in its cell, labels next to the rows, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from modiff.errors import ConfigError
from modiff.generate.grid import GAP, SMALLEST, grid, to_picture


def flat(values: list[float], side: int = SMALLEST) -> np.ndarray:
    """Images of one grey each."""
    return np.broadcast_to(np.array(values)[:, None, None, None], (len(values), side, side, 1))


def tile(picture: Image.Image, row: int, column: int, columns: int) -> np.ndarray:
    """The pixels where an image must be, counted from the right and the top."""
    right = picture.width - GAP - (columns - 1 - column) * (SMALLEST + GAP)
    top = GAP + row * (SMALLEST + GAP)
    return np.asarray(picture.crop((right - SMALLEST, top, right, top + SMALLEST)))


def test_every_image_sits_in_its_row_and_column_and_labels_stay_outside() -> None:
    picture = grid([("", flat([0.0, 0.2, 0.4])), ("a label that is longer than others", flat([0.6, 0.8, 1.0]))])
    for row in range(2):
        for column in range(3):
            assert np.all(tile(picture, row, column, 3) == round(255 * 0.2 * (3 * row + column))), (row, column)
    labels = np.asarray(picture)[:, : picture.width - 3 * (SMALLEST + GAP)]
    assert np.all(labels[: SMALLEST + GAP] == 255)
    assert np.any(labels[SMALLEST + 2 * GAP :] < 128)


def test_colours_keep_their_order_and_what_is_no_number_is_black() -> None:
    image = np.zeros((1, SMALLEST, SMALLEST, 3))
    image[..., 0], image[..., 2] = 1.0, 0.2
    assert np.all(tile(grid([("", image)]), 0, 0, 1) == (255, 0, 51))
    corner = np.zeros((1, 8, 8, 1))
    corner[0, 0, 7, 0] = 1
    shown = tile(grid([("", corner)]), 0, 0, 1)  # grown by a whole factor
    assert np.all(shown[:8, -8:] == 255)
    assert shown.sum() == 8 * 8 * 3 * 255
    assert np.asarray(to_picture(np.array([[-1.0, 2.0, np.nan, np.inf]])[..., None])).tolist() == [[0, 255, 0, 255]]


@pytest.mark.parametrize("shapes", [[], [(1, 8, 8)], [(1, 8, 8, 4)], [(2, 8, 8, 1), (1, 8, 8, 1)]])
def test_rows_that_make_no_grid_are_an_error(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="rows of images"):
        grid([("a", np.zeros(shape)) for shape in shapes])
