"""A few images to look at: PNG files in a folder, resumed where it stopped, or many in one, a labelled row for each."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from modiff.config import check
from modiff.files import ResumableFolder, check_writable, write_atomically
from modiff.generate.job import Conditions, check_counts
from modiff.generate.shards import to_uint8
from modiff.generate.worker import check_inputs, draw
from modiff.progress import Bar

SETTINGS = "settings.json"
SMALLEST = 96
"""Images with a shorter side than this many pixels are enlarged by whole factors, each pixel a square."""
GAP = 2
LINES = 6
"""Lines of a label that are as high as an image."""


class Pictures(NamedTuple):
    """files: all images in order. written: how many of them now. seconds: wall time of these."""

    files: tuple[Path, ...]
    written: int
    seconds: float


def draw_pictures(
    pipe: DiffusionPipeline,
    folder: Path,
    *,
    num_images: int,
    steps: int,
    seed: int,
    conditions: Conditions,
    settings: dict[str, Any],
    batch_size: int = 8,
) -> Pictures:
    """Write 00000.png, 00001.png, ... to `folder`; those that are there already are kept and not drawn again.

    settings: what else shapes the images (model, config, ...), as JSON values; a folder never mixes two.
    Raises: ConfigError for inputs the pipeline cannot take, or a folder made with other settings; StateError for pixels
        that are not finite; OSError that names the file. Images written before are kept.
    """
    check_counts({"num_images": num_images, "steps": steps, "batch_size": batch_size}, seed)
    check_inputs(pipe, steps, conditions)
    files = [folder / f"{index:05d}.png" for index in range(num_images)]
    job = settings | {"steps": steps, "seed": seed} | conditions.to_dict()
    check_writable(folder / SETTINGS)
    start = time.perf_counter()
    with ResumableFolder(folder, job, record=SETTINGS, items="[0-9]" * 5 + ".png"):
        missing = [index for index, file in enumerate(files) if not file.is_file()]
        with Bar(total=len(files), initial=len(files) - len(missing), unit="image") as bar:
            for first in range(0, len(missing), batch_size):
                indices = missing[first : first + batch_size]
                images = draw(pipe, indices, steps=steps, seed=seed, conditions=conditions)
                for index, image in zip(indices, images, strict=True):
                    picture = to_picture(image)
                    write_atomically(files[index], lambda file, picture=picture: picture.save(file, format="PNG"))
                    bar.update()
    return Pictures(tuple(files), len(missing), time.perf_counter() - start)


def grid(rows: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """Rows x columns of images with the rows' labels, of one line or several, at the left.

    rows: (label, images) pairs; images (N, H, W, C) in [0, 1], C = 1 or 3, all rows of one shape. NaN shows black.
    Raises: ConfigError if there are no rows or images, or their shapes differ.
    """
    shapes = [images.shape for _, images in rows]
    fits = bool(shapes) and len(shapes[0]) == 4 and min(shapes[0]) > 0 and shapes[0][3] in (1, 3)
    expected = "rows of images (N, H, W, C) of one shape with 1 or 3 channels"
    check("grid", shapes, fits and len(set(shapes)) == 1, expected, "Give each row the same number of images.")
    count, height, width, _ = rows[0][1].shape
    factor = max(1, -(-SMALLEST // min(height, width)))
    height, width = height * factor, width * factor
    font = label_font(height)
    words = [line for label, _ in rows for line in label.splitlines()]
    margin = 2 * GAP + max((int(font.getlength(line)) + height // LINES for line in words), default=0)
    size = (margin + count * (width + GAP), GAP + len(rows) * (height + GAP))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for r, (label, images) in enumerate(rows):
        top = GAP + r * (height + GAP)
        draw.text((GAP, top + height // 2), label, fill="black", font=font, anchor="lm")
        for c, image in enumerate(images):
            tile = to_picture(image).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (margin + c * (width + GAP), top))
    return picture


def label_font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of labels next to images of that height."""
    return ImageFont.load_default(height / LINES)


def to_picture(image: np.ndarray) -> Image.Image:
    """(H, W, C) in [0, 1] to 8 bits, rounded to nearest; values outside are clipped, NaN is 0."""
    codes = to_uint8(np.nan_to_num(np.asarray(image)))
    return Image.fromarray(codes[..., 0] if codes.shape[-1] == 1 else codes)
