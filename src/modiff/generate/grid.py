"""Many images in one: a labelled row for each setting, a column for each sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modiff.errors import ConfigError
from modiff.generate.shards import to_uint8

SMALLEST = 64
"""Images with a shorter side than this many pixels are enlarged by whole factors, each pixel a square."""
GAP = 2
FONT_SIZE = 13


def grid(rows: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """Rows x columns of images with the rows' labels at the left.

    Args:
        rows: (label, images) pairs; images (N, H, W, C) in [0, 1], C = 1 or 3, all rows of one shape. NaN shows black.
    Returns: an RGB picture.
    Raises: ConfigError if there are no rows or images, or their shapes differ.
    """
    shapes = [images.shape for _, images in rows]
    fits = bool(shapes) and len(shapes[0]) == 4 and min(shapes[0]) > 0 and shapes[0][3] in (1, 3)
    if not fits or len(set(shapes)) > 1:
        raise ConfigError(
            f"grid: expected rows of images (N, H, W, C) of one shape with 1 or 3 channels, got {shapes}. A grid has "
            "the same columns in every row. Give each row the same number of images."
        )
    font = ImageFont.load_default(FONT_SIZE)
    count, height, width, _ = rows[0][1].shape
    factor = max(1, -(-SMALLEST // min(height, width)))
    height, width = height * factor, width * factor
    margin = 2 * GAP + max(int(font.getlength(label)) + 1 for label, _ in rows)
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


def to_picture(image: np.ndarray) -> Image.Image:
    """(H, W, C) in [0, 1] to 8 bits, rounded to nearest; values outside are clipped, NaN is 0."""
    codes = to_uint8(np.nan_to_num(np.asarray(image)))
    return Image.fromarray(codes[..., 0] if codes.shape[-1] == 1 else codes)
