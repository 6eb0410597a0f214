"""Learned scales: the gradient of a quantizer with respect to its scale, straight through the rounding (LSQ).

    Q(x) = s round(clamp(x / s, qmin - z, qmax - z))
    dQ/dx = 1 inside the range, 0 beyond it
    dQ/ds = round(x / s) - x / s inside the range, qmin - z or qmax - z beyond it

These are the exact derivatives of the surrogate in which round(u) is u plus a constant (Esser et al., ICLR 2020).
Cutting before rounding, as there, gives the same codes as cutting after it, since the ends are integers.
"""

import torch
from torch import Tensor

from modiff.core.affine import SMALLEST_SCALE, QParams, qrange


def fake_quantize_through(x: Tensor, qparams: QParams, bits: int) -> Tensor:
    """Q(x), equal to `affine.fake_quantize`, with gradients for x and for the scale. Same shape and dtype as x.

    Cost: four passes over x.
    """
    qmin, qmax = qrange(bits)
    zero = torch.zeros_like(qparams.scale) if qparams.zero_point is None else qparams.zero_point
    ratio = (x / qparams.scale).clamp(qmin - zero, qmax - zero)
    codes = ratio + (ratio.round() - ratio).detach()  # the value of round, the gradient of x / s
    return (codes * qparams.scale).to(x.dtype)


class LearnedScale:
    """A quantizer whose scale is learned: s = s_0 exp(theta). Its only parameter is `theta`, a tensor like s_0.

    The exponential keeps s positive and makes a learning rate mean the same share of every scale: Q-Diffusion's Adam
    rate of 4e-4 would double a residual's scale of 4e-4 in one iteration if it were applied to s itself. LSQ's factor
    1 / sqrt(N qmax) on the gradient is left out: Adam divides it out again. The zero point stays as it starts.
    """

    def __init__(self, qparams: QParams, bits: int) -> None:
        self.start, self.bits = qparams, bits
        self.theta = torch.zeros_like(qparams.scale).requires_grad_()

    def qparams(self) -> QParams:
        """The scale as it is now, differentiable in `theta`, and the zero point."""
        scale = self.start.scale.detach() * self.theta.exp()
        return QParams(scale.clamp_min(SMALLEST_SCALE), self.start.zero_point)

    def frozen(self) -> QParams:
        """The same without gradient, in memory of its own."""
        scale, zero_point = self.qparams()
        return QParams(scale.detach().clone(), zero_point)

    def __call__(self, x: Tensor) -> Tensor:
        """Q(x) with gradients for x and `theta`."""
        scale, zero_point = self.qparams()
        zero_point = None if zero_point is None else zero_point.to(x.device)
        return fake_quantize_through(x, QParams(scale.to(x.device), zero_point), self.bits)
