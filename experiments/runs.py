"""One run of the study: a sampler, its steps, and modiff's config; and what came of it, as plain numbers."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from experiments.skipping import SkipRule
from modiff.config import JsonConfig, ModiffConfig, ModulationConfig, StateDtype
from modiff.evaluate.metrics.bootstrap import bootstrap

RESAMPLES = 1000
PARALLEL = "parallel "
"""Before the name of a sampler: ten of its steps in a batch, with tolerance .1 (docs/parallel.md)."""
PAPER = ModulationConfig(anchor_weights="quantized", stagger=False)
"""The loop as published; the experiments change single fields of it."""


def quantized_with(
    config: ModiffConfig, *, clip: float | None = None, granularity: str | None = None, bits: int | None = None
) -> ModiffConfig:
    """The config with another quantizer of activations; None keeps what it has."""
    old = config.layer.activation
    activation = replace(
        old,
        clip=old.clip if clip is None else clip,
        granularity=granularity or old.granularity,
        bits=old.bits if bits is None else bits,
    )
    return replace(config, layer=replace(config.layer, activation=activation))


def looped(config: ModiffConfig, modulation: ModulationConfig) -> ModiffConfig:
    """The config with another loop."""
    return replace(config, layer=replace(config.layer, modulation=modulation))


def in_dtype(config: ModiffConfig, dtype: StateDtype) -> ModiffConfig:
    """The config with its states in another dtype."""
    return looped(config, replace(config.layer.modulation or PAPER, state_dtype=dtype))


@dataclass(frozen=True, kw_only=True)
class Run(JsonConfig):
    """What is sampled. config None: full precision.

    sampler: a name of `modiff.generate.samplers`, with `PARALLEL` before it or without.
    spacing: of the timesteps, the scheduler's own when None.
    skip: residuals that are not sent. exact_first: a plain config whose first step is in full precision.
    """

    steps: int
    sampler: str = "ddim"
    spacing: str | None = None
    config: ModiffConfig | None = None
    skip: SkipRule | None = None
    exact_first: bool = False

    @property
    def reference(self) -> Run:
        """Full precision with the same sampler and steps, one after the other."""
        return Run(steps=self.steps, sampler=self.sampler.removeprefix(PARALLEL), spacing=self.spacing)

    @property
    def key(self) -> str:
        """Equal runs have equal keys, others do not."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


class Outcome(TypedDict):
    """Errors against one reference, image by image: Σ (x - y)² and Σ y², None if an image is not finite.

    pixels: of one image. evaluations: of the network, in one trajectory. gbops: of one image, all steps; None where
    nobody counted.
    """

    errors: list[float] | None
    sizes: list[float]
    pixels: int
    evaluations: int
    gbops: float | None


def compare(images: np.ndarray, reference: np.ndarray, evaluations: int, gbops: float | None) -> Outcome:
    """The outcome of images (N, H, W, C) against those of the reference."""
    ours, theirs = images.astype(np.float64), reference.astype(np.float64)
    axes = (1, 2, 3)
    errors = ((ours - theirs) ** 2).sum(axes).tolist() if np.isfinite(ours).all() else None
    sizes = (theirs**2).sum(axes).tolist()
    return {"errors": errors, "sizes": sizes, "pixels": int(ours[0].size), "evaluations": evaluations, "gbops": gbops}


def errors_of(outcome: Outcome) -> dict[str, float | None]:
    """Relative L2 of all pixels together with a 95 % interval over the images, its median over them, and PSNR.

    For images in [0, 1]. All are None if the run diverged; psnr_db also if nothing differs. Cost: a bootstrap.
    """
    if outcome["errors"] is None or not sum(outcome["sizes"]):
        return dict.fromkeys(("relative_l2", "low", "high", "median", "psnr_db"))
    errors = torch.tensor(outcome["errors"], dtype=torch.float64)
    sizes = torch.tensor(outcome["sizes"], dtype=torch.float64)
    interval = bootstrap(_relative, [errors, sizes], resamples=RESAMPLES, draw="paired")
    mean_square = float(errors.sum()) / (len(errors) * outcome["pixels"])
    return {
        "relative_l2": interval["estimate"],
        "low": interval["low"],
        "high": interval["high"],
        "median": float(np.median((errors / sizes.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().numpy())),
        "psnr_db": -10 * math.log10(mean_square) if mean_square else None,
    }


def _relative(errors: Tensor, sizes: Tensor) -> float:
    # a resample of black images only has no size, and no share of it either
    return math.sqrt(float(errors.sum()) / float(sizes.sum())) if float(sizes.sum()) else 0.0
