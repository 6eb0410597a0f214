"""Data of one Gaussian per element, its exact prediction, and the law of what a sampler makes of a faulty one."""

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

MEAN, VARIANCE, STEPS = 0.3, 0.25, 50


def sampler() -> DDIMScheduler:
    """DDIM of 50 steps, linear betas."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    return scheduler


def prediction(scheduler: Any, timestep: int, state: Tensor) -> Tensor:
    """E[eps | x_t] of data N(MEAN, VARIANCE)."""
    ab = float(scheduler.alphas_cumprod[timestep])
    return (1 - ab) ** 0.5 * (state - ab**0.5 * MEAN) / (ab * VARIANCE + 1 - ab)


def final_moments(scheduler: Any, eta: float, k: float, mu: float, sq: float) -> tuple[float, float]:
    """Mean and variance of the last state for the prediction (1 + k) eps + mu + sq n, to 3 and 4 digits.

    A step is affine in x, n and the sampler's noise z: its coefficients are read off the scheduler.
    """
    mean, variance = 0.0, 1.0
    for t in scheduler.timesteps.tolist():

        def step(x: float, n: float, z: float, t: int = t) -> float:
            state = torch.full((1, 1), x, dtype=torch.float64)
            output, noise = (1 + k) * prediction(scheduler, t, state) + mu + sq * n, torch.full_like(state, z)
            return float(scheduler.step(output, t, state, eta=eta, variance_noise=noise).prev_sample)

        base = step(0, 0, 0)
        slope, error, noise = step(1, 0, 0) - base, step(0, 1, 0) - base, step(0, 0, 1) - base
        mean, variance = base + slope * mean, slope**2 * variance + error**2 + noise**2
    return round(mean, 3), round(variance, 4)
