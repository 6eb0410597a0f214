"""Samples that are better coded from zero: their input jumps, or has left the anchor behind.

    p_t = 0      â_t = quantize(a_t)      ô_t = b + A_q(â_t)

This is an anchor at zero, where A(0) + b = b is known at no cost: the law holds with a_anchor = 0. A sample starts
there when its output then loses less, in the mean square. With w = |A - A_q|^2 / |A|^2 and scales s:

    s(a_t)^2 / 12 + w |a_t|^2    <    s(r_t)^2 / 12 + w |a_t - a_anchor|^2

In the last terms, what is the same at all tokens or pixels does not count: norms take most of it away.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modiff.core.affine import QParams, noise_of
from modiff.core.granularity import positions
from modiff.core.quantizer import Code, Quantizer

POSITIONS = 16
"""About how many tokens or pixels of a sample's anchor are kept, to tell how far away it is."""


def thinned(x: Tensor, channel_dim: int) -> Tensor:
    """A view of x at about `POSITIONS` tokens or pixels of each sample, with all channels."""
    axes = positions(x, channel_dim)
    for axis in axes:
        apart = -(-x.shape[axis] // round(POSITIONS ** (1 / len(axes))))
        x = x[(slice(None),) * axis + (slice(None, None, apart),)]
    return x


class Anchor:
    """Where the states of one input started, at some positions: whether the weight's rounding error gains by it.

    runs: of channels, thinned, less their mean over positions; 0 for samples that started from zero since.
    noise: w of the layer that reads the input, the largest of several. steps: since the states started.
    """

    def __init__(self, runs: Sequence[Tensor], channel_dim: int) -> None:
        self.channel_dim, self.noise, self.steps, self.runs = channel_dim, 0.0, 0, list[Tensor]()
        for run in runs:
            some = thinned(run, channel_dim).double()
            axes = positions(some, channel_dim)
            self.runs.append(some - some.mean(axes, keepdim=True) if axes else some.clone())

    def due(self) -> bool:
        """Whether to look at the distance at this step: the 1st, 2nd, 4th and each 8th, so that it costs little."""
        self.steps += 1
        return self.steps in (1, 2, 4) or self.steps % 8 == 0

    def excess(self, runs: Sequence[Tensor], noise: Tensor, *, due: bool) -> Tensor:
        """12 w (|x - a|^2 - |x|^2) for what has a flag in `noise`, which is in the same unit, squares of scales.

        runs: of the channels of x, thinned. due: otherwise at most 0, so that only what jumps can start again.
        """
        axes = tuple(axis for axis, size in enumerate(noise.shape) if size == 1)
        channels, excess = sum(a.shape[self.channel_dim] for a in self.runs), torch.zeros(())
        for i, (x, a) in enumerate(zip(runs, self.runs, strict=True)):
            share = 12 * self.noise * a.shape[self.channel_dim] / channels
            mean = share * (a * torch.sub(a, x, alpha=2)).mean(axes, keepdim=True)
            excess = excess + mean if i else mean
        return excess if due else excess.clamp(max=0)

    def of_rows(self, rows: Callable[[Tensor], Tensor]) -> "Anchor":
        """That of other rows, which `rows` takes from a tensor."""
        other = Anchor((), self.channel_dim)
        other.runs, other.noise, other.steps = [rows(run) for run in self.runs], self.noise, self.steps
        return other

    def leave(self, intra: Tensor) -> None:
        """These samples start from zero now."""
        self.runs = [run.masked_fill(intra, 0.0) for run in self.runs]


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
    x: Tensor, prediction: Tensor, codes: Code, quantizer: Quantizer, smooth: float | None = None,
    held: Tensor | None = None, anchor: Anchor | None = None, *, due: bool = False,
) -> tuple[Tensor | None, float, Code]:  # fmt: skip
    """Flags of the samples that start from zero, None for none; the least noise of any value; codes of both kinds.

    smooth: that noise, where it is known to be larger than of any residual, so that no sample jumps.
    held: of a predictor that moves, the state itself: what is close to it does not jump, the move was wrong alone.
    anchor, due: as `Anchor.excess` has it.
    Cost: a pass over x for its scales, where a sample may start again; then it is coded too.
    """
    noise, excess = noise_of([q for _, q in codes.parts], quantizer.runs), torch.zeros((), device=x.device)
    if anchor is not None:
        value = prediction + codes.value()
        excess = anchor.excess([thinned(run, quantizer.channel_dim) for run in quantizer.split(value)], noise, due=due)
    if smooth is not None and not float(excess.max()) > 0:
        return None, smooth, codes
    scales = [quantizer.measured(run) for run in quantizer.split(x)]
    own_noise = noise_of(scales, quantizer.runs)
    least, intra = float(own_noise.min()) ** 0.5 if x.is_cpu else 0.0, jumped(noise + excess, own_noise)
    if held is not None and intra is not None:
        noise = noise_of([quantizer.measured(run) for run in quantizer.split(x - held.to(x.dtype))], quantizer.runs)
        intra = jumped((noise + excess).where(intra, 0.0), own_noise)
    if intra is None:
        return None, least, codes
    own = quantizer.scaled(x, scales)
    intra = jumped((x - prediction - codes.value()).square() + excess / 12, (x - own.value()).square(), intra)
    if intra is None:
        return None, least, codes
    if anchor is not None:
        anchor.leave(intra)
    parts = []
    for (new, (scale, point)), (old, (other, other_point)) in zip(own.parts, codes.parts, strict=True):
        points = None if point is None or other_point is None else torch.where(intra, point, other_point)
        parts.append((torch.where(intra, new, old), QParams(torch.where(intra, scale, other), points)))
    return intra, least, Code(tuple(parts), quantizer.channel_dim)
