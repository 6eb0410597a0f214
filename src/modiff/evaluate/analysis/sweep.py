"""What the finished image loses at each bit width, and what plain reuse of outputs would lose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np

from modiff import presets
from modiff.api import apply, remove
from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.errors import CalibrationError
from modiff.evaluate.metrics.paired import psnr, relative_l2

SWEEP_MODES: dict[str, Callable[[int | None, int], ModiffConfig]] = {
    "plain": presets.plain,
    "modulated": presets.modulated,
    "uncompensated": presets.uncompensated,
    "tuned": presets.tuned,
}
"""tuned is the preset; `modiff.tune` would refine it for the model."""


class ImageError(TypedDict):
    """Images against those of full precision, same noise. None if they are not finite; psnr_db also if equal."""

    relative_l2: float | None
    psnr_db: float | None


class SweepRow(ImageError):
    """One mode at one bit width."""

    mode: str
    bits: int


class ReuseRow(ImageError):
    """All layers run at every `interval`-th step and repeat their output in between; no bits, no prediction."""

    interval: int


def bit_sweep(
    target: Any,
    run: Callable[[], object],
    reference: np.ndarray,
    config: ModiffConfig,
    bits: Sequence[int],
    modes: Sequence[str] = tuple(SWEEP_MODES),
) -> list[SweepRow]:
    """The image error of every mode at every bit width.

    Args:
        target: a pipeline without modiff; it is without when this returns or raises.
        run: generates the images, from the same noise at each call.
        reference: the images of full precision, (N, H, W, C).
        config: selection and weight bits; each mode brings the other layer settings.
    Cost: a trajectory for each mode and bit width.
    """
    weight = config.layer.weight.bits
    return [
        {
            "mode": mode,
            "bits": width,
            **_error_with(target, run, reference, config, SWEEP_MODES[mode](weight, width).layer),
        }
        for mode in modes
        for width in bits
    ]


def reuse_sweep(
    target: Any, run: Callable[[], object], reference: np.ndarray, config: ModiffConfig, intervals: Sequence[int]
) -> list[ReuseRow]:
    """The image error of repeating the outputs of all layers that the config takes, as feature caches do.

    In the words of the recursion: hold predictor, zero bits, anchored again every `interval` steps. Weights stay in
    full precision, so the error is that of reuse alone. Arguments and cost as for `bit_sweep`.
    """
    return [{"interval": n, **_error_with(target, run, reference, config, _reuse_every(n))} for n in intervals]


def _reuse_every(interval: int) -> LayerConfig:
    modulation = ModulationConfig(reanchor_every=interval, stagger=False)
    return LayerConfig(weight=WeightConfig(bits=None), activation=QuantizerConfig(bits=0), modulation=modulation)


def _error_with(
    target: Any, run: Callable[[], object], reference: np.ndarray, config: ModiffConfig, layer: LayerConfig
) -> ImageError:
    """The image error with the layers of `config` under another layer config."""
    apply(target, dataclasses.replace(config, layer=layer, overrides=()))
    try:
        return image_error(images(run()), reference)
    finally:
        remove(target)


def images(result: object) -> np.ndarray:
    """The images of what a pipeline returned. Raises: CalibrationError if it holds none."""
    array = getattr(result, "images", result)
    if not isinstance(array, np.ndarray):
        raise CalibrationError(
            f"run: expected an array of images, got {type(array).__name__}. They are compared number by number. "
            'Call the pipeline with output_type="np".'
        )
    return array


def image_error(value: np.ndarray, reference: np.ndarray) -> ImageError:
    """Relative L2 and PSNR of images in [0, 1]."""
    if not np.isfinite(value).all():
        return {"relative_l2": None, "psnr_db": None}
    decibels = psnr(value, reference)
    return {"relative_l2": relative_l2(value, reference), "psnr_db": decibels if math.isfinite(decibels) else None}
