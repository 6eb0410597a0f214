"""Steps of decoupled diffusion as published, and a generalised DDIM step, in float64; imports nothing of modiff."""

import torch
from torch import Tensor


def published(name: str, x: Tensor, t: float, u: float, c: Tensor, eps: Tensor, k: Tensor) -> tuple[Tensor, float]:
    """Mean and variance of x_{t-u} of (x_t, C, eps, K)."""
    if name == "const_2":
        return x - u * c - (2 * u * t - u**2) / t * eps, (2 * u * t - u**2) * (t - u) ** 2 / t**2
    mean = x - u * c - u / t**0.5 * eps
    return mean + (k * (u**2 / 2 - t * u) if name == "linear" else 0), u * (t - u) / t


def ddim(
    x: Tensor, eps: Tensor, now: tuple[float, float], then: tuple[float, float], sigma: float, z: Tensor
) -> Tensor:
    """sqrt(ab_s) x_0 + sqrt(1 - ab_s - sigma^2) eps + sigma z, x_0 not clipped; levels are (sqrt(ab), sqrt(1 - ab))."""
    image = (x - now[1] * eps) / now[0]
    return then[0] * image + max(then[1] ** 2 - sigma**2, 0.0) ** 0.5 * eps + sigma * z


def mixture_noise(x: Tensor, a: Tensor, s: Tensor, means: Tensor, weights: Tensor, width: float) -> Tensor:
    """E[eps | a x_0 + s eps = x] for x_0 of a mixture of normals of one width."""
    variance = (a * width) ** 2 + s**2
    distance = x[..., None] - a * means
    share = torch.softmax(weights.log() - distance**2 / (2 * variance), -1)
    return s / variance * (share * distance).sum(-1)
