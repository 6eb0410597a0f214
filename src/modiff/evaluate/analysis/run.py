"""What modulated quantization does to a model: per layer and step, over the steps, and over the bit widths."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from modiff import presets
from modiff.config import ModiffConfig, check
from modiff.evaluate.analysis.growth import ErrorGrowth
from modiff.evaluate.analysis.layers import LayerTraces
from modiff.evaluate.analysis.watch import watch
from modiff.evaluate.pipelines import NOTHING, PipelineSource, has_static_scales, image_error
from modiff.evaluate.timing import PROBED, QUANTIZED
from modiff.generate.environment import environment
from modiff.generate.job import Conditions
from modiff.generate.worker import check_inputs, draw

BITS = (8, 7, 6, 5, 4, 3, 2)
SWEEP_MODES = ("plain", "modulated", "uncompensated", "tuned")
"""Families of presets; tuned is the preset, which `modiff.tune` would refine for the model."""
Analysis = dict[str, Any]
"""environment; settings: the arguments; layers: see `LayerTrace`; growth: see `Growth`;
outliers: of each layer that no scale fits `modiff.model.roles.Outlier`, and advice; sweep: rows of mode, bits,
relative_l2 and psnr_db. All of it plain values for JSON."""


def analyze_pipeline(
    pipe: DiffusionPipeline,
    config: ModiffConfig | None = None,
    *,
    steps: int = 50,
    num_images: int = 4,
    seed: int = 0,
    conditions: Conditions = NOTHING,
    bits: Sequence[int] = BITS,
    progress: bool = True,
) -> Analysis:
    """Layer errors, error growth and a sweep of bit widths of a pipeline, which is unchanged afterwards.

    The layers' recursions run on the inputs of one full-precision trajectory; the sweep samples with the modulated
    network and judges the images alone.
    config: of the layers' recursion, with dynamic scales; modulated 4 bits and full-precision weights when None, for
    errors of the activations alone. num_images: generated in one batch, image i from the noise of seed + i.
    Raises: ConfigError if the pipeline needs other inputs, the config has static scales or codes nothing;
        StateError if full precision itself is not finite.
    Cost: len(bits) * 4 + 1 trajectories, most of them modulated.
    """
    config = config or presets.modulated(None, 4)
    source = PipelineSource(pipe, seed=seed, conditions=conditions)
    check_inputs(pipe, steps, conditions)
    check("num_images", num_images, num_images >= 1, "at least 1 image", "Use num_images=4.")
    check("steps", steps, steps >= 2, "2 or more", "What changes between steps is coded. Use steps=50.")
    why = "They are measured on a modulated model, and this watches the plain one. Use dynamic=True."
    check("analyze", "dynamic=False", not has_static_scales(config), "dynamic scales", why)
    errors, growth = LayerTraces(), ErrorGrowth()
    reference: list[np.ndarray] = []
    parts = [("layers", PROBED, steps), ("bit widths", QUANTIZED, steps * len(bits) * len(SWEEP_MODES))]
    job = {"steps": steps, "seed": seed, "conditions": conditions}
    with source.bar(parts, progress) as bar:
        bar.begin("layers")
        watch(pipe, lambda: reference.append(draw(pipe, range(num_images), **job)), config, [errors, growth])
        grown = growth.growth()  # before the long part: it may have nothing to show
        bar.begin("bit widths")
        sweep = bit_sweep(source, reference[0], config, steps, bits)
    return {
        "environment": environment(),
        "settings": {
            "steps": steps, "num_images": num_images, "seed": seed, **conditions.to_dict(), "bits": list(bits),
            "config": config.to_dict(),
        },
        "layers": errors.layers(), "growth": grown, "sweep": sweep,
        "outliers": [{**outlier._asdict(), "advice": str(outlier)} for outlier in errors.maxima.outliers()],
    }  # fmt: skip


def bit_sweep(
    source: PipelineSource,
    reference: np.ndarray,
    config: ModiffConfig,
    steps: int,
    bits: Sequence[int],
    modes: Sequence[str] = SWEEP_MODES,
) -> list[dict[str, Any]]:
    """The error to `reference`, the first images of full precision, of every mode at every bit width.

    config: selection and weight bits; each mode brings the other layer settings.
    """
    rows: list[dict[str, Any]] = []
    for mode, width in itertools.product(modes, bits):
        layer = presets.FAMILIES[mode](config.layer.weight.bits, width).layer
        with source.open(dataclasses.replace(config, layer=layer, overrides=()), steps) as draw:
            images = draw(range(len(reference))).images
        rows.append({"mode": mode, "bits": width, **image_error(images, reference)})
    return rows
