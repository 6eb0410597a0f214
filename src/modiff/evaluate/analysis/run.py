"""What modulated quantization does to a model: per layer and step, over the steps, and over the bit widths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from diffusers import DiffusionPipeline

from modiff import presets
from modiff.config import ModiffConfig
from modiff.errors import ConfigError
from modiff.evaluate.analysis.distribution import Distribution, DistributionResult
from modiff.evaluate.analysis.growth import ErrorGrowth, Growth
from modiff.evaluate.analysis.layers import LayerTrace, LayerTraces
from modiff.evaluate.analysis.sweep import SWEEP_MODES, ReuseRow, SweepRow, bit_sweep, images, reuse_sweep
from modiff.evaluate.analysis.watch import has_static_scales, watch
from modiff.evaluate.pipelines import check_unconditional, evaluations_bar
from modiff.generate.environment import Environment, environment
from modiff.hosts.diffusers.runs import noise_generators

BITS = (8, 7, 6, 5, 4, 3, 2)
INTERVALS = (2, 3, 5, 10)


class AnalysisSettings(TypedDict):
    """The arguments of `analyze`."""

    steps: int
    num_images: int
    seed: int
    bits: list[int]
    config: dict[str, Any]


class Analysis(TypedDict):
    """Everything `analyze` finds, as plain numbers for JSON."""

    environment: Environment
    settings: AnalysisSettings
    layers: list[LayerTrace]
    growth: Growth
    distribution: DistributionResult
    sweep: list[SweepRow]
    reuse: list[ReuseRow]


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
    """Layer errors, error growth, distributions, bit-width sweep and reuse of an unconditional pipeline.

    One full-precision trajectory serves the first three: the layers' recursions run on its inputs, with the
    states of one step in memory. The sweeps sample with the modulated network and judge the images alone.

    Args:
        pipe: a diffusers pipeline without a prompt and without modiff; it is unchanged afterwards.
        config: of the layers' recursion, with dynamic scales; modulated 4 bits and full-precision weights when None,
            so that all errors are those of the activations.
        num_images: generated in one batch, image i from the noise of seed + i.
        bits: widths of the sweep, in any order.
        progress: a bar on stderr that counts network evaluations over the whole job.
    Raises: ConfigError if the pipeline needs a prompt, the config has static scales or codes nothing.
    Cost: len(bits) * 4 + 5 trajectories, most of them modulated.
    """
    config = config or presets.modulated(None, 4)
    _check(pipe, config, steps, num_images)

    def run() -> object:
        noise = noise_generators(seed, range(num_images))
        return pipe(batch_size=num_images, num_inference_steps=steps, generator=noise, output_type="np")

    used = [n for n in INTERVALS if n <= steps]
    errors, growth, distribution = LayerTraces(), ErrorGrowth(), Distribution()
    reference: list[np.ndarray] = []
    trajectories, finished = 1 + len(bits) * len(SWEEP_MODES) + len(used), itertools.count(1)
    with evaluations_bar(pipe, steps * trajectories, progress) as bar:

        def counted() -> object:
            result = run()
            bar.total = bar.n * trajectories // next(finished)  # samplers may evaluate twice in a step
            return result

        watch(pipe, lambda: reference.append(images(counted())), config, [errors, growth, distribution])
        grown = growth.growth()  # before the long part: it may have nothing to show
        sweep = bit_sweep(pipe, counted, reference[0], config, bits)
        reuse = reuse_sweep(pipe, counted, reference[0], config, used)
    return {
        "environment": environment(),
        "settings": {
            "steps": steps, "num_images": num_images, "seed": seed, "bits": list(bits), "config": config.to_dict()
        },
        "layers": errors.layers(), "growth": grown, "distribution": distribution.result(), "sweep": sweep,
        "reuse": reuse,
    }  # fmt: skip


def _check(pipe: DiffusionPipeline, config: ModiffConfig, steps: int, num_images: int) -> None:
    check_unconditional(pipe, "analyze", steps, num_images)
    if steps < 2:
        raise ConfigError(
            f"analyze: expected 2 or more steps, got {steps}. What changes between steps is coded. Use --steps 50."
        )
    if has_static_scales(config):
        raise ConfigError(
            "analyze: expected dynamic scales, got dynamic=False. Static ones are measured on a modulated model, "
            "and this watches the plain one. Use dynamic=True."
        )
