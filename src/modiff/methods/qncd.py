"""QNCD: smooth what the time embedding amplifies, estimate what quantization adds to predictions (ACM MM 2024).

Intra: the input of a residual block's last convolution is divided by s_c, and its weights multiplied, exactly:

    n_c(t) = GroupNorm(emb(t))_c without weight g and bias
    m_c = mean_t max(n_c, 1),   s_c = max(|g_c|, .1 median |g|) m_c

Inter: x_s, the state after the step from t to s, gets known noise e again, and the mean of what is predicted for it is

    x' = sqrt(ab_t / ab_s) x_s + sqrt(1 - ab_t / ab_s) e,   b = mean(eps_q(x', t) - e)

which is subtracted from predictions until the next estimate. Without quantization b is 0 up to sqrt(2 / (batch d))
where x' is noised data. Samplers drift from there: along DDIM-50 the embedded model itself has b of .02 to .09, not a
matter of quantization. So the default compares with full precision, b = mean(eps_q(x', t) - eps(x', t)).
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from modiff.calibration.data import Call
from modiff.calibration.reconstruct.layers import evaluating
from modiff.config import ModiffConfig, WeightSearch
from modiff.errors import ConfigError
from modiff.methods.correction import Comparison, CorrectedReport, CorrectionConfig, channel_axis
from modiff.methods.q_diffusion import learn_layers
from modiff.methods.recipe import MethodJob
from modiff.methods.registry import register
from modiff.methods.sampler_steps import SamplerSteps
from modiff.methods.tfmq_dm import PROJECTION
from modiff.model.attach import attachment_of
from modiff.model.observe import observe
from modiff.model.trajectory import model_context
from modiff.sampling.lockstep import Batch, Step, lockstep

LEAST = 100_000
"""Values that a mean is taken of: it holds the images' own mean noise too, of size 1 / sqrt(batch d)."""
_Predict = Callable[[Tensor], Tensor]
_FIRST = 7  # the code's first estimate is at the eighth evaluation


@dataclass(frozen=True, kw_only=True)
class QncdConfig(CorrectionConfig):
    """QNCD's settings: 4-bit weights learned by blocks, 8-bit activations, U-Nets of diffusers.

    smoothing: "embedding" of the residual blocks, or "none". With `modulation` factors come from the change between
        steps instead: m_c = mean_t max(n_c, 1), n_c the largest |a_t - a_{t+1}| of a channel over its channels' median.
    bias: "estimated" every `interval` steps and kept as a table of the sampler, or "none". The paper estimates it while
        sampling, of one batch; here it costs nothing then, and is the mean over `pairs` trajectories.
    reference: what predictions for x' are compared with: those of "full_precision", or the "noise" e, as published.

    The estimate is evaluated in a context of its own, so that no state of the trajectory is touched. Modulated layers
    would anchor at their first step there, and show no error: they follow it at every step.
    Of the released code there is no option for: s_c = g_c m_c, which turns signs and explodes where g_c is near 0; m_c
    of the first sample of each batch; and a correction of the deviation, which is computed and set to 0.
    Cost: Q-Diffusion's, `pairs` trajectories in full precision, and `pairs` quantized ones with the estimates.
    """

    rounding: Literal["learned", "nearest"] = "learned"
    search: WeightSearch = "mse"
    smoothing: Literal["embedding", "none"] = "embedding"
    bias: Literal["estimated", "none"] = "estimated"
    reference: Literal["full_precision", "noise"] = "full_precision"
    interval: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("interval", self.interval >= 1, "1 or more steps", "1 estimates at every step.")
        self.check("eta", self.eta == 0, "0", "Re-noised states are those of DDIM without noise.")

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        return dataclasses.replace(super().quick(), pairs=128)


@register(QncdConfig)
def qncd(job: MethodJob, config: QncdConfig) -> CorrectedReport:
    """Smooth, learn rounding and measure ranges as Q-Diffusion, then estimate the bias."""
    from modiff.sampling.corrected import Correction, corrected  # late: it loads diffusers

    if config.smoothing != "none":  # before anything is run
        residual_blocks(job.model)
    if config.bias == "estimated":
        check_predictions(getattr(job.target, "scheduler", None), config)
    steps = Comparison(job, config).steps
    if config.bias == "estimated":
        check_samples(steps, config)
    layers = config.model_config(job.model)
    if config.smoothing != "none":
        layers = smoothed(layers, smoothing_of(job.model, steps[0].calls, residuals=config.modulation is not None))
    report = learn_layers(job, config, layers)
    figures: tuple[tuple[str, tuple[float, ...]], ...] = ()
    if config.bias == "estimated":
        bias = estimate_bias(steps, job.model, config, progress=job.progress)
        table = Correction.of(
            steps[0].scheduler.timesteps, offset=-bias, channel_dim=channel_axis(steps[0].recorded[0])
        )
        job.target.scheduler = corrected(job.target.scheduler, table)
        figures = (("bias", tuple(bias.flatten().tolist())),)
    return CorrectedReport(report.entries, report.memory, report.weights, report.scales, figures)


def smoothed(config: ModiffConfig, factors: Mapping[str, Tensor]) -> ModiffConfig:
    """The config with these factors of input channels, by name of layer."""
    layers = ((escape(n), dataclasses.replace(config.layer, smoothing=tuple(s.tolist()))) for n, s in factors.items())
    return dataclasses.replace(config, overrides=(*config.overrides, *layers))


def residual_blocks(model: nn.Module) -> dict[str, Any]:
    """The blocks that add the embedding before a group norm, by name. Raises: ConfigError where there is none."""
    blocks: dict[str, Any] = {}
    for name, module in model.named_modules():
        adds = getattr(module, "time_embedding_norm", None) == "default" and hasattr(module, PROJECTION)
        if adds and isinstance(getattr(module, "norm2", None), nn.GroupNorm):
            blocks[name] = module
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__}: expected residual blocks that add {PROJECTION} before a group norm, got none. "
            "QNCD smooths what the embedding amplifies there. Use smoothing='none', or another method."
        )
    return blocks


@torch.no_grad()
def smoothing_of(model: nn.Module, calls: Sequence[Call], *, residuals: bool) -> dict[str, Tensor]:
    """s_c (C,) of the last convolution of each residual block that adds the embedding before a group norm.

    calls: a trajectory in full precision, in order. residuals: of the change between steps, see `QncdConfig`.
    Raises: as `residual_blocks`. Cost: an evaluation of each call.
    """
    blocks = residual_blocks(model)
    norms: dict[str, list[Tensor]] = {name: [] for name in blocks}
    inputs: dict[str, Tensor] = {}

    def embedded(name: str, _layer: object, _inputs: object, output: Tensor) -> None:
        name = name.removesuffix(f".{PROJECTION}")
        norm = blocks[name].norm2
        norms[name].append(functional.group_norm(output.float(), norm.num_groups, eps=norm.eps))

    def moved(name: str, _layer: object, args: tuple[Tensor, ...], _kwargs: object) -> None:
        name, now = name.removesuffix(".conv2"), args[0].detach().float().clone()
        if name in inputs:
            largest = (now - inputs[name]).abs().amax((0, *range(2, now.dim())))
            norms[name].append((largest / largest.median().clamp_min(1e-12))[None])
        inputs[name] = now

    layers = [f"{name}.{'conv2' if residuals else PROJECTION}" for name in blocks]
    hooks: dict[str, Any] = {"before_layer": moved} if residuals else {"on_layer": embedded}
    with evaluating(model), observe(model, layers=layers, **hooks):
        for call in calls:
            call.evaluate(model)
    return {f"{name}.conv2": smoothing_factors(None if residuals else blocks[name].norm2.weight, torch.cat(seen))
            for name, seen in norms.items()}  # fmt: skip


def smoothing_factors(weight: Tensor | None, norms: Tensor) -> Tensor:
    """s_c (C,) from the norm's weight g (C,), 1 when None, and n_c (T, C)."""
    amplified = norms.clamp_min(1).mean(0)
    if weight is None:
        return amplified
    size = weight.detach().float().abs()
    floor = 0.1 * size.median()
    return torch.where(floor > 0, size.clamp_min(floor), torch.ones_like(size)) * amplified


def check_predictions(scheduler: Any, config: QncdConfig) -> None:
    """Raise the ConfigError of a network that does not predict noise along DDIM."""
    from diffusers import DDIMScheduler  # late: other methods need no diffusers

    kind = None if scheduler is None else scheduler.config.get("prediction_type")
    fits = scheduler is None or (kind == "epsilon" and isinstance(scheduler, DDIMScheduler))
    config.check("bias", fits, f"'none' with {type(scheduler).__name__} and prediction_type={kind!r}",
                 "Known noise is compared with predicted noise, along DDIM.")  # fmt: skip


def check_samples(steps: Sequence[SamplerSteps], config: QncdConfig) -> None:
    """Raise the ConfigError of samples too few for the bias."""
    batch, values = sum(len(s.recorded[0]) for s in steps), steps[0].recorded[0][0].numel()
    config.check(
        "pairs", batch * values >= LEAST,
        f"batch x d of at least {LEAST} for the bias, here {-(-LEAST // values)} pairs of {values} values", "The mean "
        f"holds the images' own noise, {(batch * values) ** -0.5:.2g} of {batch} x {values} = {batch * values} values. "
        "Give more pairs, or bias='none'.",
    )  # fmt: skip


def estimate_bias(
    steps: Sequence[SamplerSteps], network: nn.Module, config: QncdConfig, *, progress: bool = False
) -> Tensor:
    """b of each step, (T, 1), float64, estimated along the network's own corrected trajectories.

    Cost: an evaluation a step and batch, and one for each estimate, or at each step with modulated layers.
    """
    probes = [copy.copy(each) for each in steps]
    for probe in probes:
        probe.model = network
    scheduler, attachment = steps[0].scheduler, attachment_of(network)
    times, last = scheduler.timesteps.tolist(), getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
    follows = attachment is not None and any(layer.inputs is not None for layer in attachment.layers.values())
    start = torch.cat([each.recorded[0] for each in steps])
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(2**31 + config.seed)).to(start)
    bias = torch.zeros((), dtype=torch.float64)

    def predict(evaluators: Sequence[SamplerSteps], index: int, state: Tensor) -> Tensor:
        outputs, parts = [], state.split([len(batch.noise) for batch in batches])
        for number, (probe, part) in enumerate(zip(evaluators, parts, strict=True)):
            if attachment is None:
                outputs.append(probe.evaluate(index, part))
                continue
            with model_context(network, f"estimate {number}"):
                outputs.append(probe.evaluate(index, part))
        return torch.cat(outputs)

    def visit(step: Step) -> dict[str, Tensor]:
        nonlocal bias
        due = step.index % config.interval == min(_FIRST, config.interval - 1)
        if due or follows:
            arrived = probes[0].advance(step.index, step.state, step.output - bias.to(step.output))
            following = scheduler.alphas_cumprod[times[step.index + 1]] if step.index + 1 < len(times) else last
            kept = float(scheduler.alphas_cumprod[times[step.index]] / following)
            known = None if config.reference == "noise" else functools.partial(predict, steps, step.index)
            estimate = mean_error(arrived, noise, kept, functools.partial(predict, probes, step.index), known)
            bias = estimate if due else bias
        step.next = step.advance(step.output - bias.to(step.output))
        return {"bias": bias.reshape(1)}

    batches = [Batch(s.recorded[0], _nothing, p.evaluate) for s, p in zip(steps, probes, strict=True)]
    with evaluating(network):
        results = lockstep(scheduler, batches, visit, network=network, seed=config.seed, progress=progress)
    return torch.stack([result["bias"] for result in results])


def _nothing(_: int, state: Tensor) -> Tensor:
    """What full precision says: it is not looked at."""
    return torch.zeros_like(state)


def mean_error(state: Tensor, noise: Tensor, kept: float, predict: _Predict, exact: _Predict | None = None) -> Tensor:
    """b = mean(eps_q(x') - e), or - eps(x') by `exact`, for x' = sqrt(kept) x_s + sqrt(1 - kept) e; 0-d, float64."""
    noised = kept**0.5 * state + (1 - kept) ** 0.5 * noise
    return (predict(noised).double() - (noise if exact is None else exact(noised)).double()).mean()
