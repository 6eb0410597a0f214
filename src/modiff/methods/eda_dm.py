"""EDA-DM: states chosen by density and variety of features, layers of a block learned with it (Liu et al., 2024).

TDAC, on a feature f_i of each step i, one batch of trajectories in full precision:

    D_i = #{j != i: mean (f_i - f_j)^2 <= r},   V_i = sum_j sum over batch and pixels of 1 - cos(f_i, f_j)
    w = D' + lambda V'   (both from 0 to 1),    step i gives round(N w_i / sum w) of N samples

FBR: a block's loss + w * that of its layers but the last; rounding and static scales together, with QDrop.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from modiff.calibration.data import tensors_of
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.timesteps import CountedSteps
from modiff.config import ModulationConfig
from modiff.errors import CalibrationError, ConfigError
from modiff.files import read_json, write_json
from modiff.methods.recipe import MethodConfig, MethodJob, MethodReport, boundary_overrides, every_layer
from modiff.methods.registry import register
from modiff.model.observe import observe

_PUBLISHED = ReconstructConfig(
    learn="weights_and_scales", activations="quantized", iterations=5000, learning_rate=0.5, scale_rate=5e-4,
    schedule="cosine", regularizer=0.0, layer_weight=0.8, qdrop=0.5,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EdaDmConfig(MethodConfig):
    """EDA-DM's settings: 4-bit weights, 8-bit activations; CIFAR's rates at 4 bits.

    weight_bits: rounding is what is learned. The first and the last layer have 8 bits in any case.
    samples: states to calibrate on, one from each trajectory; their steps by "tdac", or "uniform". The first `batch`
        trajectories say which.
    feature: name of the module whose input is looked at; the paper's is the attention in the middle.
    variety: lambda; 1.0 for LSUN, 5.0 for Stable Diffusion.
    radius: r. None takes the median distance, which is free of units; the code has 3.0 (CIFAR, ImageNet), or 0.3.
    reconstruction: the code has no regularizer, so that h may end between 0 and 1: the report tells the share that does
        and the loss before h is cut. layer_weight: w; 1.0 for LSUN.
    modulation: None is the published method. With it features are changes between steps, and scales those of residuals:
        rounding is learned without them (QDrop has nothing to drop then), and they follow, layer by layer.

    Cost: `samples` + `batch` trajectories, and block reconstruction on `samples` states with two evaluations of the
        block's layers in an iteration.
    """

    weight_bits: int | None = 4
    samples: int | None = 1024
    sampling: Literal["tdac", "uniform"] = "tdac"
    feature: str = "mid_block.attentions.0"
    variety: float = 1.2
    radius: float | None = None
    reconstruction: ReconstructConfig = _PUBLISHED
    modulation: ModulationConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("weight_bits", self.weight_bits is not None, "2 to 8", "Their rounding is what is learned.")
        self.check("variety", self.variety >= 0, "0 or more", "0 looks at density alone.")
        self.check("radius", self.radius is None or self.radius > 0, "None or more than 0", "None is the median.")
        self.check("reconstruction.learn", self.reconstruction.learn == "weights_and_scales", "'weights_and_scales'",
                   "EDA-DM learns both together.")  # fmt: skip

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        quick = dataclasses.replace(_PUBLISHED, iterations=300, batch=16, scale_rate=0.01, checks=6, patience=0)
        return cls(steps=50, samples=128, reconstruction=quick)

    @property
    def rounding(self) -> ReconstructConfig:
        """How rounding is learned: with scales, or alone where layers have none of their own."""
        if self.modulation is None and self.activation_bits is not None:
            return self.reconstruction
        return dataclasses.replace(self.reconstruction, learn="weights", activations="full_precision", qdrop=0.0)

    @property
    def residuals(self) -> ReconstructConfig:
        """How static scales of residuals are learned."""
        alone = dataclasses.replace(self.reconstruction, learn="weights", layer_weight=0.0, qdrop=0.0)
        return dataclasses.replace(alone.for_residuals(), learning_rate=self.reconstruction.scale_rate)


@register(EdaDmConfig)
def eda_dm(job: MethodJob, config: EdaDmConfig) -> MethodReport:
    """States by TDAC, ranges, then rounding and scales by FBR."""
    path = job.path("steps.json")
    if path is not None and path.exists():
        what = "the samples of each step", "Delete the file: they are counted again."
        steps = CountedSteps.from_dict(read_json(path, *what))
    else:
        steps = CountedSteps(counts=_counts(job, config))
        if path is not None:
            write_json(path, steps.to_dict())
    calls = job.collect(steps, pairs=config.modulation is not None)
    layer = config.static_layer(config.modulation)
    report = job.apply(every_layer(layer, overrides=boundary_overrides(job.model, layer)))
    scales, plain = None, config.modulation is None and config.activation_bits is not None
    if plain:
        job.measure(calls)
    weights = job.learn(calls, config.rounding, "weights")
    job.keep_rounding()
    if config.modulation is not None and config.activation_bits is not None:
        job.measure(calls)
        scales = job.learn(calls, config.residuals, "scales")
    return MethodReport.of(report, weights=weights, scales=scales)


def _counts(job: MethodJob, config: EdaDmConfig) -> tuple[int, ...]:
    """How many samples each step gives. A modulated layer quantizes changes, so the first step gives none."""
    first = int(config.modulation is not None)
    if config.sampling == "uniform":
        return (0,) * first + allocate(torch.ones(job.evaluations - first), config.drawn)
    features = _features(job, config.feature)
    if first:
        features = features.diff(dim=0)
    scores = unit_range(density(features, config.radius)) + config.variety * unit_range(variety(features))
    return (0,) * first + allocate(scores, config.drawn)


def _features(job: MethodJob, name: str) -> Tensor:
    """What the module reads at each step of the first trajectories, (steps, batch, channels, pixels)."""
    seen: list[Tensor] = []

    def keep(_name: str, _module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = tensors_of((args, kwargs))[0].detach().float().cpu()
        seen.append(x.flatten(2) if x.dim() > 3 else x.transpose(1, 2))  # images, or tokens

    try:
        with observe(job.model, layers=[name], before_layer=keep):
            job.run(0)
    except AttributeError as error:
        raise ConfigError(
            f"eda_dm.feature: expected the name of a module, got {name!r}, which {type(job.model).__name__} does not "
            "have. Steps are compared by what it reads. Give the name of a block in the middle of the network."
        ) from error
    contexts, rest = divmod(len(seen), job.evaluations)
    if rest or not contexts:
        raise CalibrationError(
            f"eda_dm.feature: expected {name!r} to run at each of {job.evaluations} evaluations, got {len(seen)} runs. "
            "Steps are compared by what it reads. Give the name of another module."
        )
    return torch.stack([torch.cat(seen[i : i + contexts]) for i in range(0, len(seen), contexts)])


def density(features: Tensor, radius: float | None = None) -> Tensor:
    """D (T,): how many other steps lie within the radius of each, or within the median distance of two steps."""
    flat = features.flatten(1)
    distance = torch.stack([(flat - each).square().mean(1) for each in flat])
    apart = ~torch.eye(len(flat), dtype=torch.bool)
    limit = distance[apart].median() if radius is None else radius
    return ((distance <= limit) & apart).sum(1).to(features.dtype)


def variety(features: Tensor) -> Tensor:
    """V (T,): how unlike the other steps each is, summed over steps, batch and pixels; (T, B, C, P) features."""
    unit = torch.nn.functional.normalize(features, dim=2)
    alike = (unit * unit.sum(0, keepdim=True)).flatten(1).sum(1)  # sum over j of cos(f_i, f_j)
    steps, batch, _, pixels = features.shape
    return steps * batch * pixels - alike


def unit_range(values: Tensor) -> Tensor:
    """From 0 to 1; zeros where all are equal."""
    low, high = values.aminmax()
    return torch.zeros_like(values) if low == high else (values - low) / (high - low)


def allocate(scores: Tensor | Sequence[float], total: int) -> tuple[int, ...]:
    """`total` samples in proportion to the scores, rounded; uniform where all scores are 0.

    What rounding leaves over goes to the largest scores, one each; what it took too much comes off from the end.

    >>> allocate([1.0, 1.0, 2.0], 6), allocate([1.0, 1.0, 1.0], 4)
    ((1, 1, 4), (2, 1, 1))
    """
    weights = torch.as_tensor(scores, dtype=torch.float64)
    weights = weights if weights.any() else torch.ones_like(weights)
    counts = (total * weights / weights.sum()).round().long()
    missing = total - int(counts.sum())
    if missing > 0:
        counts[weights.argsort(descending=True, stable=True)[:missing]] += 1
    elif missing < 0:
        counts[counts.nonzero().flatten()[missing:]] -= 1
    return tuple(counts.tolist())
