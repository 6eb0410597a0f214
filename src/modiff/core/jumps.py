"""Samples that jump: the change of their input is coded with more noise than the input itself would be.

    p_t = 0      â_t = quantize(a_t)      ô_t = b + A_q(â_t)

This is an anchor at zero, where A(0) + b = b is known at no cost: the law holds with a_anchor = 0.
"""

import torch
from torch import Tensor

from modiff.core.affine import QParams, noise_of
from modiff.core.quantizer import Code, Quantizer


def jumped(residual: Tensor, value: Tensor, before: Tensor | None = None) -> Tensor | None:
    """Flags of the samples where the first is larger, on average over what shares a flag; None if there are none.

    First of the noise (`affine.noise_of`) of both, then of their squared coding errors where flags were set `before`.
    Cost: on CPUs one flag is read to know that there are none; elsewhere nothing waits, and there are always flags.
    """
    if before is not None:
        axes = tuple(axis for axis, size in enumerate(before.shape) if size == 1)
        residual, value = (x.mean(axes, keepdim=True) for x in (residual, value))
    larger = residual > value if before is None else before & (residual > value)
    return larger if not larger.is_cpu or larger.any() else None


def from_zero(
    residual: Tensor, x: Tensor, codes: Code, quantizer: Quantizer, held: Tensor | None = None
) -> tuple[Tensor | None, float, Code]:
    """Flags of the samples that jump, None for none; the least noise of any sample's value; codes of both kinds.

    held: of a predictor that moves, the residual of the state itself: where that is small, the move was wrong alone.
    Cost: a pass over x for its scales; it is coded too where they say that a sample may jump.
    """
    scales = [quantizer.measured(run) for run in quantizer.split(x)]
    noise, least = noise_of([q for _, q in codes.parts], quantizer.runs), noise_of(scales, quantizer.runs)
    bound, intra = float(least.min()) ** 0.5 if x.is_cpu else 0.0, jumped(noise, least)
    if held is not None and intra is not None:
        noise = noise_of([quantizer.measured(run) for run in quantizer.split(held)], quantizer.runs)
        intra = jumped(noise.where(intra, 0.0), least)
    if intra is None:
        return None, bound, codes
    own = quantizer.scaled(x, scales)
    intra = jumped((residual - codes.value()).square(), (x - own.value()).square(), intra)
    if intra is None:
        return None, bound, codes
    parts = []
    for (new, (scale, point)), (old, (other, other_point)) in zip(own.parts, codes.parts, strict=True):
        points = None if point is None or other_point is None else torch.where(intra, point, other_point)
        parts.append((torch.where(intra, new, old), QParams(torch.where(intra, scale, other), points)))
    return intra, bound, Code(tuple(parts), quantizer.channel_dim)
