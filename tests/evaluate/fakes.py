"""A source of images and an extractor without networks, for tests of the evaluation suite."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modiff.config import ModiffConfig
from modiff.evaluate.features.extractor import Features
from modiff.evaluate.pipelines import DrawnImages
from modiff.evaluate.timing import TimeBar

SHAPE = (12, 12, 1)


def noise(seed: int, *shape: int) -> Tensor:
    """uint8 of any shape."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class FakeSource:
    """Image i is noise of seed i; fewer than `steps` steps and each config add a small noise. Counts what it draws."""

    shape = SHAPE

    def __init__(self, seed: int = 0, *, steps: int = 4, stop_after: int | None = None, broken: bool = False) -> None:
        self.settings: dict[str, Any] = {"seed": seed, "weights": "none"}
        self.seed, self.steps, self.stop_after, self.broken = seed, steps, stop_after, broken
        self.drawn: list[range] = []

    @contextmanager
    def bar(self, parts: Sequence[tuple[str, float, int]], shown: bool) -> Iterator[TimeBar]:
        yield TimeBar(parts, shown=False)

    @contextmanager
    def open(self, config: ModiffConfig | None, steps: int) -> Iterator[Callable[[Sequence[int]], DrawnImages]]:
        def draw(indices: Sequence[int]) -> DrawnImages:
            if self.stop_after is not None and len(self.drawn) >= self.stop_after:
                raise KeyboardInterrupt
            self.drawn.append(range(indices[0], indices[-1] + 1))
            images = self.images(config, steps, indices) / 255
            if self.broken and config is not None:
                images[:] = np.nan
            return DrawnImages(images, 0.5 * len(indices), 2**20 * len(indices), 0, 100.0 * steps)

        yield draw

    def images(self, config: ModiffConfig | None, steps: int, indices: Sequence[int]) -> np.ndarray:
        size = 0
        if config is not None or steps < self.steps:
            size = 4 + (steps + sum(json.dumps(config and config.to_dict()).encode())) % 8
        rngs = [np.random.default_rng(self.seed + index) for index in indices]
        images = [rng.integers(30, 220, SHAPE) + rng.integers(-size, size + 1, SHAPE) for rng in rngs]
        return np.stack(images).astype(np.uint8)


class FakeExtractor:
    """Means of the four quadrants, pixels of one row, and two classes: bright or dark."""

    name = "quadrants"
    dimension = 4
    note = None

    def __call__(self, images: Tensor) -> Features:
        pixels = images.float()[..., 0] / 255
        parts = [pixels[:, y : y + 6, x : x + 6].mean(dim=(1, 2)) for y in (0, 6) for x in (0, 6)]
        bright = (pixels.mean(dim=(1, 2)) * 40 - 20).sigmoid()
        return Features(torch.stack(parts, dim=1), pixels[:, 0, :6], torch.stack([bright, 1 - bright], dim=1))
