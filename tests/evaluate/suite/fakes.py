"""A source of images and an extractor without networks, for tests of the evaluation suite."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modiff.evaluate.features.extractor import Features
from modiff.evaluate.suite.plans import Plan
from modiff.evaluate.suite.store import DrawnImages

SHAPE = (12, 12, 1)


class FakeSource:
    """Image i is noise of seed i; each plan but the first kind adds its own small noise. Counts what it is asked."""

    shape = SHAPE

    def __init__(self, seed: int = 0, *, stop_after: int | None = None, broken: Sequence[str] = ()) -> None:
        self.settings: dict[str, Any] = {"seed": seed, "weights": "none"}
        self.seed, self.stop_after, self.broken = seed, stop_after, broken
        self.opened: list[str] = []
        self.drawn: list[tuple[str, range]] = []

    @contextmanager
    def open(self, plan: Plan, evaluated: Callable[[], object]) -> Iterator[Callable[[Sequence[int]], DrawnImages]]:
        self.opened.append(plan.name)

        def draw(indices: Sequence[int]) -> DrawnImages:
            if self.stop_after is not None and len(self.drawn) >= self.stop_after:
                raise KeyboardInterrupt
            self.drawn.append((plan.name, range(indices[0], indices[-1] + 1)))
            evaluated()
            broken = len(indices) if plan.name in self.broken else 0
            return DrawnImages(
                self.images(plan, indices), 0.5 * len(indices), 2**20 * len(indices), broken, 100.0 * plan.steps
            )

        yield draw

    def images(self, plan: Plan, indices: Sequence[int]) -> np.ndarray:
        full = plan.family == "steps" and plan.name == "full precision"
        size = 0 if full else 4 + int(hashlib.sha256(plan.key.encode()).hexdigest(), 16) % 8
        images = []
        for index in indices:
            rng = np.random.default_rng(self.seed + index)
            image = rng.integers(30, 220, SHAPE)
            images.append(image + rng.integers(-size, size + 1, SHAPE))
        return np.stack(images).astype(np.uint8)


class FakeExtractor:
    """Means of the four quadrants, pixels of one row, and two classes: bright or dark."""

    name = "quadrants"
    dimension = 4
    note = None

    def __call__(self, images: Tensor) -> Features:
        pixels = images.float()[..., 0] / 255
        parts = [pixels[:, y : y + 6, x : x + 6].mean(dim=(1, 2)) for y in (0, 6) for x in (0, 6)]
        pooled = torch.stack(parts, dim=1)
        bright = (pixels.mean(dim=(1, 2)) * 40 - 20).sigmoid()
        return Features(pooled, pixels[:, 0, :6], torch.stack([bright, 1 - bright], dim=1))
