"""TAC: at each step, a factor for each channel of the prediction and a shift of the state (ECCV 2024).

    K_t,c minimises  (1 - a) sum (K q - r)² + a N sum (K q / r - 1)² + b N (K - 1)²        y_s <- y_s - mean (y_s - x_s)

with r the prediction of full precision on its own trajectory x, and q the quantized one on its corrected trajectory y.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from modiff.methods.correction import (
    CorrectionConfig,
    Results,
    channel_axis,
    moments_by_channel,
    quantize_and_correct,
    row_table,
)
from modiff.methods.recipe import MethodJob, MethodReport
from modiff.methods.registry import register
from modiff.sampling.lockstep import Step


@dataclass(frozen=True, kw_only=True)
class TacConfig(CorrectionConfig):
    """TAC's settings: one pass of both networks side by side, each on its own trajectory. There is no official code.

    relative, ridge: the weights a and b of the relative error and of (K - 1)² (Stable Diffusion 3.5: 0.8 and 0.1).
        Both 0 is least squares, as in `quick`: noise in q makes K of the relative error far too small.
    floor: entries with |r| <= floor * rms(r) of their channel are left out of the relative error and of N: for normal
        predictions E[1 / r²] is infinite, so the result depends on it. State it next to every figure.
    corrects: "all" entries, or the "large" ones, |q| > threshold * mean |q| of their sample. The third-party code
        corrects q > threshold * mean |q|, so no negative one; which entries the paper means is not known.
    bias: the state's mean error is one number ("state") or one for each channel ("channel").

    K is made of sums over all samples, not averaged over batches. With `modulation`, the states are open all along, and
    the table is that of modulation.
    Cost: that of the network's quantization, then three evaluations a step of each of the `pairs`.
    """

    pairs: int = 32
    relative: float = 0.5
    ridge: float = 0.1
    floor: float = 0.1
    corrects: Literal["all", "large"] = "all"
    threshold: float = 1.0
    bias: Literal["state", "channel"] = "state"

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size: least squares, as the relative error draws K far below 1."""
        return dataclasses.replace(super().quick(), relative=0.0, ridge=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("relative", "floor"):
            self.check(name, 0 <= getattr(self, name) <= 1, "0 to 1", "0.5 and 0.1 are the usual ones.")
        self.check("ridge", self.ridge >= 0, "0 or more", "It draws K towards 1.")
        self.check("threshold", self.threshold >= 0, "0 or more", "It is a share of mean |q|.")

    def visit(self, step: Step) -> dict[str, Tensor]:
        """K and b; goes on from the quantized network's own corrected state."""
        axis, mask = channel_axis(step.output), self.mask(step.output)
        gain = factors(step.output, step.full_output, mask, self, axis)
        shape = [1] * step.output.dim()
        shape[axis] = -1
        changed = torch.where(mask, step.output * gain.reshape(shape), step.output.double()).to(step.output.dtype)
        arrived = step.advance(changed)
        error = moments_by_channel(arrived - step.full_next)
        error = error if self.bias == "channel" else error.mean().reshape(1)
        step.next = arrived - error.reshape(shape).to(arrived.dtype)
        return {"K": gain, "b": error}

    def mask(self, output: Tensor) -> Tensor:
        """The entries that are corrected."""
        from modiff.sampling.corrected import large  # late: it loads diffusers

        return torch.ones_like(output, dtype=torch.bool) if self.corrects == "all" else large(output, self.threshold)

    def table(self, scheduler: Any, results: Results, channel_dim: int) -> Any:
        """g = K, and the shift b."""
        from modiff.sampling.corrected import Correction  # late: it loads diffusers

        return Correction.of(
            scheduler.timesteps, gain=row_table(results, "K"), shift=row_table(results, "b"), channel_dim=channel_dim,
            threshold=self.threshold if self.corrects == "large" else None,
        )  # fmt: skip


def factors(q: Tensor, r: Tensor, mask: Tensor, config: TacConfig, axis: int) -> Tensor:
    """K of each channel, (C,), float64; 1 where nothing is to be corrected."""
    q, r, mask = (t.movedim(axis, 0).flatten(1) for t in (q.double(), r.double(), mask))
    kept = mask & (r.abs() > config.floor * r.square().mean(1, keepdim=True).sqrt())
    n = kept.sum(1)
    ratio = torch.where(kept, q / torch.where(kept, r, 1.0), 0.0)
    q = torch.where(mask, q, 0.0)
    absolute, relative, ridge = 1 - config.relative, config.relative * n, config.ridge * n
    above = absolute * (q * r).sum(1) + relative * ratio.sum(1) + ridge
    below = absolute * q.square().sum(1) + relative * ratio.square().sum(1) + ridge
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 1.0)


@register(TacConfig)
def tac(job: MethodJob, config: TacConfig) -> MethodReport:
    """Quantize, fit K and the shift in one pass of both networks, and correct the sampler."""
    return quantize_and_correct(job, config)
