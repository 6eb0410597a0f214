"""A few images: nothing drawn twice, mixed or lost; in a grid, every one in its cell."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modiff.errors import ConfigError
from modiff.generate.job import Conditions
from modiff.generate.pictures import GAP, SMALLEST, Pictures, draw_pictures, grid, to_picture
from tests.pixels import pixel_pipeline


def run(folder: Path, num_images: int = 3, pipe: Any = None, **options: Any) -> Pictures:
    options = {"steps": 2, "seed": 0, "conditions": Conditions(), "batch_size": 2, "settings": {"model": "m"}} | options
    return draw_pictures(pipe or pixel_pipeline(), folder, num_images=num_images, **options)


def test_more_images_and_another_batch_size_extend_a_folder_and_other_settings_are_refused(tmp_path: Path) -> None:
    run(tmp_path, 1, seed=5)
    done = run(tmp_path, 3, batch_size=1, seed=5)
    assert (done.written, [file.name for file in done.files]) == (2, ["00000.png", "00001.png", "00002.png"])
    record = {"model": "m", "steps": 2, "seed": 5, "prompts": None, "labels": None}
    assert json.loads((tmp_path / "settings.json").read_text()) == record
    for other in ("seed", "steps"):
        with pytest.raises(ConfigError, match=f"same job, got one with another {other}"):
            run(tmp_path, 4, **{"seed": 5} | {other: 3})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ConfigError, match=r"00000\.png alone"):
        run(tmp_path)


def test_what_means_nothing_is_an_error_before_the_folder_is_touched(tmp_path: Path) -> None:
    for options, message in ({"steps": 1001}, "steps: expected at most 1000"), ({"seed": -1}, "seed: expected 0"):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


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
    size = SMALLEST // 8
    assert np.all(shown[:size, -size:] == 255)
    assert shown.sum() == size**2 * 3 * 255
    assert np.asarray(to_picture(np.array([[-1.0, 2.0, np.nan, np.inf]])[..., None])).tolist() == [[0, 255, 0, 255]]
