"""AdaRound: learn for each weight whether it rounds down or up (Nagel et al., ICML 2020; used by Q-Diffusion, MoDiff).

    W_q = s (clamp(floor(W / s) + h(v) + z, qmin, qmax) - z)
    h(v) = clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1),    zeta = 1.1, gamma = -0.1
    loss = reconstruction + lambda * sum(1 - |2 h(v) - 1|^beta)

v starts where h(v) is the fraction that floor cut off, so W_q starts at W. While beta falls from 20 to 2 the penalty
drives every h to 0 or 1; at the end h is cut at one half, which is v = 0.
"""

import torch
from torch import Tensor

from modiff.core.affine import QParams, dequantize, qrange
from modiff.errors import ConfigError

ZETA, GAMMA = 1.1, -0.1
"""How far the sigmoid is stretched beyond [0, 1], so that h reaches both ends at a finite v."""


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """h(v) = clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1).

    >>> rectified_sigmoid(torch.tensor([-3.0, 0.0, 3.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (logits.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def logits_of(share: Tensor) -> Tensor:
    """The v with h(v) = share, for shares in [0, 1]: the inverse of `rectified_sigmoid`."""
    return torch.logit((share - GAMMA) / (ZETA - GAMMA))


def beta_at(iteration: int, iterations: int) -> float | None:
    """The exponent of the penalty: linear from 20 to 2 after a fifth of the iterations; None before, without penalty.

    >>> beta_at(19, 100), beta_at(20, 100), beta_at(60, 100), beta_at(100, 100)
    (None, 20.0, 11.0, 2.0)
    """
    first = 0.2 * iterations
    if iteration < first:
        return None
    return 2.0 + 18.0 * max(0.0, 1.0 - (iteration - first) / max(1.0, iterations - first))


class AdaRound:
    """One weight, or one run of it, whose rounding is learned. Its only parameter is `logits`.

    Args:
        values: the weight before rounding, rotated if the layer rotates. qparams: its scales, which are not learned.
    Raises: ConfigError if a weight is not finite.
    Cost: two floats a weight, and a handful of passes over the weight for each `soft`.
    """

    def __init__(self, values: Tensor, qparams: QParams, bits: int) -> None:
        if not torch.isfinite(values).all():
            raise ConfigError(
                "AdaRound: expected finite weights, got NaN or infinity. No rounding of them means anything. "
                "Load the checkpoint again, or exclude the layer."
            )
        self.qparams, self.bits = QParams(qparams.scale.detach().clone(), qparams.zero_point), bits
        ratio = values.detach() / self.qparams.scale
        below = ratio.floor()
        self.logits = logits_of(ratio - below).requires_grad_()  # h(v) = frac(W / s)
        self.floor = below if qparams.zero_point is None else below + qparams.zero_point

    def soft(self) -> Tensor:
        """W_q with h between 0 and 1, for training; differentiable in `logits`, except where the code saturates."""
        qmin, qmax = qrange(self.bits)
        codes = (self.floor + rectified_sigmoid(self.logits)).clamp(qmin, qmax)
        return dequantize(codes, self.qparams)

    def codes(self) -> Tensor:
        """The learned integers: h cut at one half. int8, no gradient."""
        qmin, qmax = qrange(self.bits)
        return (self.floor + (self.logits.detach() >= 0)).clamp(qmin, qmax).to(torch.int8)

    def hard(self) -> Tensor:
        """What `codes` stand for; no gradient."""
        return dequantize(self.codes(), self.qparams)

    def penalty(self, beta: float) -> Tensor:
        """sum(1 - |2 h - 1|^beta): zero where every h is 0 or 1."""
        return (1 - (2 * rectified_sigmoid(self.logits) - 1).abs().pow(beta)).sum()

    def undecided(self, margin: float = 0.01) -> int:
        """How many weights are still further than `margin` from both ends. Cost: a host sync."""
        share = rectified_sigmoid(self.logits.detach())
        return int(((share > margin) & (share < 1 - margin)).sum())
