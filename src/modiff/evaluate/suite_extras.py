"""Figures for which the extra `eval` is needed: LPIPS to full precision, and how well images fit their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.features.clip_score import ClipScore
from modiff.evaluate.features.perceptual import PerceptualDistance
from modiff.evaluate.metrics.bootstrap import bootstrap, small_sample_note
from modiff.evaluate.suite_metrics import ImageSet, Measurement, measurement
from modiff.generate.conditions import Conditions

BATCH = 64
EXTRAS = ("lpips", "clip")


class Extra(Protocol):
    """A figure beside those that are always there. name: tells network and weights, so it shapes the result."""

    name: str

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ConfigError if it cannot judge images (H, W, C)."""
        ...

    def measure(self, found: ImageSet, full: ImageSet, resamples: int) -> list[Measurement]:
        """Its rows of a configuration; none where it has nothing to say."""
        ...


class Lpips:
    """Mean LPIPS of image i to image i of full precision."""

    def __init__(self, *, device: str = "cpu") -> None:
        self._distance = PerceptualDistance("alex", device=device)
        self.name = self._distance.name

    def check(self, shape: tuple[int, int, int]) -> None:
        """At least 32 pixels a side."""
        empty = torch.zeros(1, *shape, dtype=torch.uint8)
        self._distance(empty, empty)

    def measure(self, found: ImageSet, full: ImageSet, resamples: int) -> list[Measurement]:
        """One row; none for full precision itself."""
        if found is full or found.images is None or full.images is None:
            return []
        wanted = torch.from_numpy(full.images)

        def one(images: Tensor, indices: slice) -> Tensor:
            return self._distance(images, wanted[indices])

        return [_mean_row("lpips", self.name, _by_batch(found.images, one), resamples, "Image i of both from seed i.")]


class Clip:
    """Mean CLIP score of the images and the prompts that they were drawn of."""

    def __init__(self, folder: Path, conditions: Conditions, *, device: str = "cpu") -> None:
        self._conditions = conditions
        self._score = ClipScore(folder, device=device)
        self.name = self._score.name

    def check(self, shape: tuple[int, int, int]) -> None:
        """Grey or colour images."""
        self._score(torch.zeros(1, *shape, dtype=torch.uint8), self._prompts(range(1)))

    def measure(self, found: ImageSet, full: ImageSet, resamples: int) -> list[Measurement]:
        """One row, for full precision too: what its score is the others are to be compared with."""
        if found.images is None:
            return []

        def one(images: Tensor, indices: slice) -> Tensor:
            return self._score(images, self._prompts(range(indices.start, indices.start + len(images))))

        note = "Of each image and its own prompt. No error: compare with full precision's."
        return [_mean_row("clip_score", self.name, _by_batch(found.images, one), resamples, note)]

    def _prompts(self, indices: Sequence[int]) -> list[str]:
        return self._conditions.prompts_of(indices) or []


def load_extras(text: str | None, *, clip: Path | None, conditions: Conditions, device: str = "cpu") -> list[Extra]:
    """The figures that `text` names: lpips and clip, between commas; none for None.

    Args:
        clip: the folder of a CLIP model, for clip.
        conditions: with the prompts that the images are drawn of, for clip.
    Raises: ConfigError for another name, a name twice, packages that are missing, clip without its folder or without
        prompts, or a folder without clip; FormatError if the folder holds no CLIP model.
    """
    names = [] if text is None else [part.strip() for part in text.split(",")]
    wrong = [name for name in names if name not in EXTRAS or names.count(name) > 1]
    if wrong:
        raise ConfigError(
            f"--metrics: expected {' or '.join(EXTRAS)}, or both between commas, got {text!r}. They come beside the "
            "figures that are always there. Use --metrics lpips."
        )
    if "clip" in names and not conditions.prompts:
        raise ConfigError(
            "--metrics clip: expected prompts, got none. It compares an image with the prompt that it was drawn of. "
            "Give --prompts FILE with a model that takes text, or leave clip out."
        )
    if ("clip" in names) != (clip is not None):
        raise ConfigError(
            f"--clip: expected the folder of a CLIP model together with --metrics clip, got "
            f"{'--metrics clip alone' if clip is None else f'{clip} without it'}. Nothing is downloaded. "
            "Use --metrics clip --clip DIR."
        )
    made: dict[str, Callable[[], Extra]] = {
        "lpips": lambda: Lpips(device=device),
        "clip": lambda: Clip(clip or Path(), conditions, device=device),
    }
    return [made[name]() for name in names]


def _by_batch(images: np.ndarray, one: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """A number for each image, float64 (N,)."""
    parts = (slice(first, first + BATCH) for first in range(0, len(images), BATCH))
    return torch.cat([one(torch.from_numpy(images[part]), part) for part in parts]).double()


def _mean_row(name: str, label: str, values: Tensor, resamples: int, note: str) -> Measurement:
    found = bootstrap(_mean, [values], resamples=resamples)
    small = small_sample_note("mean", len(values))
    said = note if small is None else f"{note} {small}"
    return measurement(name, label, label, found["estimate"], len(values), said, found["low"], found["high"])


def _mean(values: Tensor) -> float:
    return float(values.mean())
