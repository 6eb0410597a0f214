"""On the embedded model each method is nearer to full precision than min-max ranges, at the bits it is made for.

Small settings, so that each takes seconds: fewer steps, states and iterations than `quick`. docs/methods.md has the
figures of the real ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from modiff.assets import embedded_folder
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.evaluate.metrics.paired import relative_l2
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import noise_generators
from modiff.methods.accuquant import AccuquantConfig
from modiff.methods.modiff import ModiffMethodConfig
from modiff.methods.ptq4dm import Ptq4dmConfig
from modiff.methods.q_diffusion import QDiffusionConfig
from modiff.methods.registry import quantize
from modiff.methods.tfmq_dm import TfmqDmConfig

STEPS, IMAGES, OTHER_NOISE = 10, 4, 1_000_000
WEIGHTS = dataclasses.replace(
    ReconstructConfig.quick_weights(), iterations=50, batch=4, learning_rate=0.3, checks=2
)  # at a rate at which each rounding can still change its mind
BYTES = dataclasses.replace(WEIGHTS, iterations=10)
LEARNING = dataclasses.replace(ReconstructConfig.quick_activation_scales(), iterations=5, batch=8, checks=2)
SMALL: dict[str, Any] = {"steps": STEPS, "samples": 8, "batch": 8}
LEARNED: dict[str, Any] = {**SMALL, "groups": 5, "reconstruction": WEIGHTS}
METHODS = {
    "q_diffusion": QDiffusionConfig(weight_bits=4, activation_bits=8, learning=LEARNING, **LEARNED),
    "tfmq_dm": TfmqDmConfig(weight_bits=4, activation_bits=8, temporal=WEIGHTS, **LEARNED),
    "accuquant": AccuquantConfig(weight_bits=8, activation_bits=8, steps=STEPS, samples=4, batch=4, iterations=3),
    "ptq4dm": Ptq4dmConfig(weight_bits=8, activation_bits=8, **{**SMALL, "samples": 32}),
    **{
        f"modiff {kind}": ModiffMethodConfig(
            kind=kind, weight_bits=8, activation_bits=4, learning=LEARNING, **{**LEARNED, "reconstruction": BYTES}
        )
        for kind in ("dynamic", "static_minmax", "static_steps", "static_learned")
    },
}


def sampled(config: object) -> Tensor:
    """Images of the embedded model after a method, from noise that it was not calibrated on."""
    pipe = set_scheduler(load_pipeline(str(embedded_folder())), "ddim")
    pipe.set_progress_bar_config(disable=True)
    if config is not None:
        quantize(pipe, config, progress=False)
    noise = noise_generators(OTHER_NOISE, range(IMAGES))
    return torch.from_numpy(
        pipe(batch_size=IMAGES, num_inference_steps=STEPS, generator=noise, output_type="np").images
    )


@functools.cache
def full_precision() -> Tensor:
    return sampled(None)


@functools.cache
def of_minmax(weight_bits: int, activation_bits: int) -> float:
    """Round to nearest, static min-max ranges of the same states."""
    config = QDiffusionConfig(
        weight_bits=weight_bits, activation_bits=activation_bits, groups=5, search="minmax", rounding="nearest",
        scales="measured", **SMALL,
    )  # fmt: skip
    return relative_l2(sampled(config), full_precision())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_beats_minmax_at_its_bits(name):
    config: Any = METHODS[name]
    error = relative_l2(sampled(config), full_precision())
    base = of_minmax(config.weight_bits, config.activation_bits)
    assert error < 0.99 * base
