"""PTQD: what quantization adds to a prediction is a multiple of it, a mean and noise (He et al., NeurIPS 2023).

    eps_q = (1 + k_t) eps + mu_t + s_t n
    e = (eps_q - mu_t) / (1 + k_t)        sigma'² = max(0, sigma² - (B s_t / (1 + k_t))²)

with B the factor of the network's output in the sampler's step.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modiff.api import remove
from modiff.config import is_bits
from modiff.methods.correction import (
    Comparison,
    CorrectionConfig,
    Results,
    moments_by_channel,
    quantize_and_correct,
    row_table,
)
from modiff.methods.q_diffusion import q_diffusion
from modiff.methods.recipe import MethodJob, MethodReport
from modiff.methods.registry import register
from modiff.sampling.lockstep import Step


@dataclass(frozen=True, kw_only=True)
class PtqdConfig(CorrectionConfig):
    """PTQD's settings: 1024 pairs of trajectories, both networks evaluated on the states of full precision.

    bias: mu_t, the mean of each channel, is that of what the regression leaves ("remainder", the paper), or of the
        whole error ("total", the released code), which is another one where k_t E[eps] is not 0.
    slope: k_t is at least 0 ("positive", published), or what the regression says ("any").
    step_bits: activation bits to choose from for each step, as (4, 8), the most of them `activation_bits`: the fewest
        whose ratio of signal to noise exceeds that of the state, see `bits_of_steps`. () has the same at all steps.
        Each width is tried on the pairs first, and each step has scales of its own, for these steps alone.
    direction: of DDIM with eta > 0. "kept" is the formula; "released" also shrinks the direction with the noise, as the
        released step does, so that the mean of the step changes.

    With `modulation`, the network runs along the trajectories with its states, and the table is that of modulation.
    The noise is corrected for DDIM with eta > 0 and DDPM. SDE-DPM-Solver++ keeps its own, as earlier outputs and
    their errors count in its steps too; the other samplers add none.
    Cost: that of the network's quantization, then three evaluations a step of each of the `pairs`; two more of each for
        each of the `step_bits`.
    """

    bias: Literal["remainder", "total"] = "remainder"
    slope: Literal["positive", "any"] = "positive"
    direction: Literal["kept", "released"] = "kept"
    step_bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = sorted(set(self.step_bits))
        fits = len(widths) >= 2 and all(map(is_bits, widths)) and widths[-1] == self.activation_bits
        self.check("step_bits", not widths or fits, f"widths of 2 to {self.activation_bits}, activation_bits the most",
                   "There is a choice of two or more. Use () for the same bits at all steps.")  # fmt: skip
        self.check("step_bits", not widths or self.scales == "measured", "() with scales='learned'",
                   "Rows of many steps are learned together. Use scales='measured'.")  # fmt: skip

    def visit(self, step: Step) -> dict[str, Tensor]:
        """k_t, mu_t, s_t and the ratio of signal to noise |eps|² / |eps_q - eps|²; goes on from full precision."""
        step.next = step.full_next
        exact, error = step.full_output.double(), (step.output - step.full_output).double()
        centered = exact - exact.mean()
        k = (centered * error).sum() / centered.square().sum().clamp_min(1e-300)
        if self.slope == "positive":
            k = k.clamp_min(0)
        remainder = error - k * exact
        mu = moments_by_channel(error if self.bias == "total" else remainder)
        s = remainder.flatten(1).std(1, correction=0).mean()
        ratio = exact.square().sum() / error.square().sum().clamp_min(1e-300)
        return {"k": k, "mu": mu, "s": s, "signal_to_noise": ratio}

    def table(self, scheduler: Any, results: Results, channel_dim: int) -> Any:
        """g = 1 / (1 + k), c = -mu g, and the noise that is left."""
        from modiff.sampling.corrected import Correction  # late: it loads diffusers

        gain = 1 / (1 + row_table(results, "k"))
        noise = noise_factors(scheduler, row_table(results, "s") * gain, self.eta)
        return Correction.of(
            scheduler.timesteps, gain=gain, offset=-row_table(results, "mu") * gain, noise=noise,
            eta=None if noise is None else self.eta, channel_dim=channel_dim,
            released_direction=noise is not None and self.direction == "released",
        )  # fmt: skip


def noise_factors(scheduler: Any, remaining: Tensor, eta: float) -> Tensor | None:
    """sqrt(max(0, 1 - B² s² / sigma²)) of each step, (T,); None for samplers other than DDIM with eta > 0 and DDPM.

    The factor B of the output and the noise sigma are read off the scheduler, at a state where nothing is clipped.
    remaining: s, the deviation of corrected outputs.
    """
    kind = type(scheduler).__name__
    if not (kind.endswith("DDIMScheduler") and eta > 0) and not kind.endswith("DDPMScheduler"):
        return None
    words, zero, small = {} if kind.endswith("DDPMScheduler") else {"eta": eta}, torch.zeros(1, 1).double(), 1e-6
    factors: list[float] = []
    for timestep, s in zip(scheduler.timesteps, remaining.flatten().tolist(), strict=True):

        def step(output: Tensor, t: Any = timestep) -> float:
            noise = torch.Generator().manual_seed(0)
            return float(scheduler.step(output, t, zero, generator=noise, return_dict=False, **words)[0])

        drawn = float(torch.randn(1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        sigma, slope = step(zero) / drawn, (step(zero + small) - step(zero)) / small
        factors.append(math.sqrt(max(0.0, 1 - (slope * s / sigma) ** 2)) if sigma else 1.0)
    return torch.tensor(factors, dtype=torch.float64)


def bits_of_steps(scheduler: Any, signal_to_noise: Mapping[int, Sequence[float]]) -> list[int]:
    """The fewest activation bits of each step whose prediction has less noise than the state has; the most, if none.

    |eps|² / |eps_q - eps|² > ab_t / (1 - ab_t). signal_to_noise: by bits, from a report for each: `dict(report.steps)`.
    >>> from diffusers import DDIMScheduler
    >>> scheduler = DDIMScheduler()
    >>> scheduler.set_timesteps(4)
    >>> bits_of_steps(scheduler, {4: [9.0, 9.0, 9.0, 9.0], 8: [500.0, 500.0, 500.0, 500.0]})
    [4, 4, 4, 8]
    """
    alphas = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
    forward = [alpha / (1 - alpha) for alpha in alphas]
    widths = sorted(signal_to_noise)
    enough = ([b for b in widths if signal_to_noise[b][step] > ratio] for step, ratio in enumerate(forward))
    return [bits[0] if bits else widths[-1] for bits in enough]


@register(PtqdConfig)
def ptqd(job: MethodJob, config: PtqdConfig) -> MethodReport:
    """Quantize, regress the error on the prediction at each step, and correct the sampler."""
    if not config.step_bits:
        return quantize_and_correct(job, config)
    comparison, ratios = Comparison(job, config), {}
    for bits in sorted(set(config.step_bits)):
        tried = copy.copy(comparison)
        tried.job, tried.config = copy.copy(job), dataclasses.replace(config, activation_bits=bits, step_bits=())
        tried.job.config, tried.job.folder = tried.config, job.path(f"{bits}-bit")
        q_diffusion(tried.job, tried.config)
        ratios[bits] = [float(result["signal_to_noise"]) for result in tried.learn(job.model)[1]]
        remove(job.target)
    anchors = 0 if config.modulation is None else 1  # a modulated network sends nothing at its first step
    chosen = tuple(bits_of_steps(comparison.scheduler, ratios)[anchors:])
    return quantize_and_correct(job, dataclasses.replace(config, activation_bits=max(chosen), step_bits=()), chosen)
