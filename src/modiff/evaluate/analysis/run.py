"""What modulated quantization does to a model: per layer and step, over the steps, and over the bit widths."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from modiff import presets
from modiff.api import apply, remove
from modiff.config import ModiffConfig
from modiff.errors import CalibrationError, ConfigError
from modiff.evaluate.analysis.growth import ErrorGrowth
from modiff.evaluate.analysis.layers import LayerTraces
from modiff.evaluate.analysis.watch import watch
from modiff.evaluate.pipelines import check_pipeline, evaluations_bar, has_static_scales, image_error
from modiff.generate.environment import environment
from modiff.hosts.diffusers.runs import noise_generators

BITS = (8, 7, 6, 5, 4, 3, 2)
SWEEP_MODES: dict[str, Callable[[int | None, int], ModiffConfig]] = {
    "plain": presets.plain,
    "modulated": presets.modulated,
    "uncompensated": presets.uncompensated,
    "tuned": presets.tuned,
}
"""tuned is the preset; `modiff.tune` would refine it for the model."""
Analysis = dict[str, Any]
"""environment; settings: the arguments; layers: see `LayerTrace`; growth: see `Growth`;
sweep: rows of mode, bits, relative_l2 and psnr_db. All of it plain values for JSON."""


def analyze_pipeline(
    pipe: DiffusionPipeline,
    config: ModiffConfig | None = None,
    *,
    steps: int = 50,
    num_images: int = 4,
    seed: int = 0,
    bits: Sequence[int] = BITS,
    progress: bool = True,
) -> Analysis:
    """Layer errors, error growth and a sweep of bit widths of an unconditional pipeline, which is unchanged afterwards.

    The layers' recursions run on the inputs of one full-precision trajectory; the sweep samples with the modulated
    network and judges the images alone.

    Args:
        config: of the layers' recursion, with dynamic scales; modulated 4 bits and full-precision weights when None,
            so that all errors are those of the activations.
        num_images: generated in one batch, image i from the noise of seed + i.
    Raises: ConfigError if the pipeline needs a prompt, the config has static scales or codes nothing.
    Cost: len(bits) * 4 + 1 trajectories, most of them modulated.
    """
    config = config or presets.modulated(None, 4)
    _check(pipe, config, steps, num_images)

    def run() -> object:
        noise = noise_generators(seed, range(num_images))
        return pipe(batch_size=num_images, num_inference_steps=steps, generator=noise, output_type="np")

    errors, growth = LayerTraces(), ErrorGrowth()
    reference: list[np.ndarray] = []
    trajectories, finished = 1 + len(bits) * len(SWEEP_MODES), itertools.count(1)
    with evaluations_bar(pipe, steps * trajectories, progress) as bar:

        def counted() -> object:
            result = run()
            bar.total = bar.n * trajectories // next(finished)  # samplers may evaluate twice in a step
            return result

        watch(pipe, lambda: reference.append(images(counted())), config, [errors, growth])
        grown = growth.growth()  # before the long part: it may have nothing to show
        sweep = bit_sweep(pipe, counted, reference[0], config, bits)
    return {
        "environment": environment(),
        "settings": {
            "steps": steps, "num_images": num_images, "seed": seed, "bits": list(bits), "config": config.to_dict()
        },
        "layers": errors.layers(), "growth": grown, "sweep": sweep,
    }  # fmt: skip


def _check(pipe: DiffusionPipeline, config: ModiffConfig, steps: int, num_images: int) -> None:
    check_pipeline(pipe, "analyze", num_images)
    if steps < 2:
        raise ConfigError(
            f"analyze: expected 2 or more steps, got {steps}. What changes between steps is coded. Use --steps 50."
        )
    if has_static_scales(config):
        raise ConfigError(
            "analyze: expected dynamic scales, got dynamic=False. Static ones are measured on a modulated model, "
            "and this watches the plain one. Use dynamic=True."
        )


def bit_sweep(
    target: Any,
    run: Callable[[], object],
    reference: np.ndarray,
    config: ModiffConfig,
    bits: Sequence[int],
    modes: Sequence[str] = tuple(SWEEP_MODES),
) -> list[dict[str, Any]]:
    """The image error of every mode at every bit width, on a pipeline that is without modiff before and after.

    run: generates the images, from the same noise at each call. reference: those of full precision, (N, H, W, C).
    config: selection and weight bits; each mode brings the other layer settings.
    """
    rows: list[dict[str, Any]] = []
    for mode, width in itertools.product(modes, bits):
        layer = SWEEP_MODES[mode](config.layer.weight.bits, width).layer
        apply(target, dataclasses.replace(config, layer=layer, overrides=()))
        try:
            rows.append({"mode": mode, "bits": width, **image_error(images(run()), reference)})
        finally:
            remove(target)
    return rows


def images(result: object) -> np.ndarray:
    """The images of what a pipeline returned. Raises: CalibrationError if it holds none."""
    array = getattr(result, "images", result)
    if not isinstance(array, np.ndarray):
        raise CalibrationError(
            f"run: expected an array of images, got {type(array).__name__}. They are compared number by number. "
            'Call the pipeline with output_type="np".'
        )
    return array
