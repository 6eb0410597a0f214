"""MoDiff: quantize the change between steps, with dynamic or static scales (Gao et al., ICML 2025)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, Self

from torch import nn

from modiff.api import calibrate, trajectory
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.timesteps import UniformGroups
from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.methods.recipe import MethodConfig, MethodJob, MethodReport, every_layer
from modiff.methods.registry import register
from modiff.methods.residual_ranges import measure_residuals

Kind = Literal["dynamic", "static_minmax", "static_learned", "static_steps"]


def _published() -> ModulationConfig:
    return ModulationConfig(anchor_weights="quantized")


@dataclass(frozen=True, kw_only=True)
class ModiffMethodConfig(MethodConfig):
    """MoDiff's settings: 8-bit weights, residuals in 8 bits or fewer, all linear layers and convolutions.

    kind: of the residuals' scales. "dynamic" measures each residual (the paper's LCQ and LTQ). "static_minmax" has one
        scale per layer that covers every residual of the calibration set. "static_learned" starts there and learns the
        scale, layer by layer, on pairs of neighbouring steps (the paper's Q-Diff + MoDiff). "static_steps", which is
        ours, measures the residuals of modulated trajectories, a scale for each of `step_groups` groups of
        neighbouring steps: one scale for all is made for the largest step and too coarse for the others.
    weight_bits, activation_bits: None keeps floats.
    modulation: of the loop; the paper's first step has full-precision inputs and quantized weights.
    groups: equally spaced steps that residuals and states are kept of. samples: states of each; None takes the code's,
        32 for "static_minmax" and "static_steps", 256 otherwise.
    step_groups: of "static_steps"; 0 is a scale for each step. They serve only the steps that they were measured at.
    rounding: of weights. "learned" with `reconstruction`: MoDiff takes Q-Diffusion's checkpoints; or "nearest".
    learning: of the scales (Adam 4e-4 to 0, p = 2.4; the code has p = 2 for latent models).

    Dynamic scales are per token and per sample, static ones per tensor, max|r| / (2^(b-1) - 1), one for each half of a
    split shortcut. Not taken over from the released code: scales of (max - min) / (levels - 1) with half the levels,
    which throw away one bit, and pairs of a first step with itself, whose residual is zero.
    Cost: none for dynamic scales with weights rounded to nearest. Otherwise `samples` trajectories; two evaluations of
        each state for static scales, or `samples` modulated trajectories for "static_steps"; block reconstruction of
        weights and of each layer's scale where they are learned.
    """

    kind: Kind = "dynamic"
    modulation: ModulationConfig = field(default_factory=_published)
    groups: int = 20
    samples: int | None = None
    step_groups: int = 10
    rounding: Literal["learned", "nearest"] = "learned"
    reconstruction: ReconstructConfig = field(default_factory=ReconstructConfig.weights)
    learning: ReconstructConfig = field(default_factory=ReconstructConfig.activation_scales)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_groups(self.groups)
        static = self.kind != "dynamic"
        self.check("activation_bits", not static or self.activation_bits is not None,
                   f"2 to 8 with kind={self.kind!r}", "Floats have no scale. Use kind='dynamic'.")  # fmt: skip
        self.check("step_groups", self.step_groups >= 0, "0 or more groups", "0 is a scale for each step.")
        hold = self.modulation.predictor == "hold"
        self.check("modulation", hold or self.kind in ("dynamic", "static_steps"),
                   f"predictor='hold' with kind={self.kind!r}", "Ranges are those of a change.")  # fmt: skip
        self.check_learning("reconstruction", "weights")
        self.check_learning("learning", "activation_scales")
        self.model_config()

    @classmethod
    def quick(cls, kind: Kind = "dynamic") -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        weights, scales = ReconstructConfig.quick_weights(), ReconstructConfig.quick_activation_scales()
        return cls(kind=kind, steps=50, groups=10, samples=16, batch=16, reconstruction=weights, learning=scales)

    @property
    def drawn(self) -> int:
        """Samples of each group."""
        few = 32 if self.kind in ("static_minmax", "static_steps") else 256
        return few if self.samples is None else self.samples

    @property
    def pairs(self) -> bool:
        """Whether calibration looks at residuals of full precision."""
        return self.kind in ("static_minmax", "static_learned")

    @property
    def learns_weights(self) -> bool:
        """Whether rounding is learned."""
        return self.weight_bits is not None and self.rounding == "learned"

    def model_config(self) -> ModiffConfig:
        """All layers alike."""
        static = self.kind != "dynamic"
        activation = QuantizerConfig(
            bits=self.activation_bits, granularity="tensor" if static else "auto", dynamic=not static,
            step_groups=self.step_groups if self.kind == "static_steps" else 1,
        )  # fmt: skip
        weight = WeightConfig(bits=self.weight_bits, search="mse")
        return every_layer(LayerConfig(weight=weight, activation=activation, modulation=self.modulation))


@register(
    ModiffMethodConfig,
    plain="MoDiff is modulation: without it, its scales of residuals would serve whole activations",
)
def modiff(job: MethodJob, config: ModiffMethodConfig) -> MethodReport:
    """Modulated layers, and rounding and scales of residuals where they are learned or measured."""
    calls = weights = scales = None
    if config.pairs or config.learns_weights:
        calls = job.collect(UniformGroups(groups=min(config.groups, job.evaluations)), pairs=config.pairs)
    report = job.apply(config.model_config())
    if calls is not None and config.learns_weights:
        weights = job.learn(calls, config.reconstruction, "weights")
    job.keep_rounding()
    if config.kind == "static_steps":
        calibrate(job.target, lambda: _sample(job, config))
    elif calls is not None and config.pairs:
        measure_residuals(job.model, calls, progress=job.progress)
        if config.kind == "static_learned":
            scales = job.learn(calls, config.learning.for_residuals(), "scales")
    return MethodReport.of(report, weights=weights, scales=scales)


def _sample(job: MethodJob, config: ModiffMethodConfig) -> None:
    """All trajectories of calibration, one after another, with scales measured at each step on the way."""
    for i in range(config.drawn // config.batch):
        with trajectory(job.target) if isinstance(job.target, nn.Module) else nullcontext():
            job.run(i)
