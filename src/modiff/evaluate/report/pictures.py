"""Images side by side, and where they differ from full precision."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np

from modiff.evaluate.report.document import Figure
from modiff.generate.grid import grid

MOST_IMAGES = 8
"""Columns of a strip: more would be too small to see."""


def image_figures(rows: Sequence[tuple[str, np.ndarray]], seed: int) -> list[Figure]:
    """A strip of images for each configuration, and beside it one of differences to the first, full precision.

    Args:
        rows: (name, images uint8 (N, H, W, C)) with the same seeds in every row.
        seed: of the first image.
    """
    count = min(MOST_IMAGES, len(rows[0][1]))
    seeds = f"seeds {seed} to {seed + count - 1}"
    (reference_name, reference), *others = rows
    reference = reference[:count]
    first = f"{count} images of {reference_name}, {seeds}."
    found = [Figure("images-0", first, f"{reference_name}, {seeds}", _strip(reference / 255), pixels=True)]
    for i, (name, images) in enumerate(others, 1):
        gain, colours = differences(images[:count], reference)
        largest = int(np.abs(images[:count].astype(np.int64) - reference).max())
        seen = f"{count} images of configuration {name}, {seeds}."
        beside = f"Difference of {name} to {reference_name}, enlarged {gain:g} times; the largest is {largest} of 255."
        found += [
            Figure(f"images-{i}", seen, name, _strip(images[:count] / 255), pixels=True, half=True),
            Figure(f"difference-{i}", beside, beside, _strip(colours), pixels=True, half=True),
        ]
    return found


def differences(images: np.ndarray, reference: np.ndarray) -> tuple[float, np.ndarray]:
    """A gain, and the difference times the gain as colours (N, H, W, 3) in [0, 1]: red above, blue below, white equal.

    The difference of the channels' means; the gain is the largest power of two, at least 1, that saturates at most 1 %
    of the pixels.
    """
    change = (images.astype(np.float64) - reference.astype(np.float64)).mean(axis=-1) / 255
    gain = _gain(change)
    scaled = (change * gain).clip(-1, 1)
    red, blue = 1 + scaled.clip(max=0), 1 - scaled.clip(min=0)
    return gain, np.stack([red, 1 - np.abs(scaled), blue], axis=-1)


def _gain(change: np.ndarray) -> float:
    """A power of two from 1 up; 1 for images that are equal."""
    high = float(np.quantile(np.abs(change), 0.99)) or float(np.abs(change).max())
    return 2.0 ** max(0, math.floor(-math.log2(high))) if high else 1.0


def _strip(images: np.ndarray) -> bytes:
    """Images (N, H, W, C) in [0, 1] in a row, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    grid([("", images)]).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
