"""PTQ4DM: calibrate on states of the denoising process, more of them near the image (Shang et al., CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Self

from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.timesteps import NormalSteps, Spread
from modiff.config import AttentionConfig, LayerConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.core.observers import Observer, RangeSearchObserver
from modiff.core.range_metrics import RANGE_METRICS
from modiff.methods.recipe import MethodConfig, MethodJob, MethodReport, boundary_overrides, every_layer
from modiff.methods.registry import register


@dataclass(frozen=True, kw_only=True)
class Ptq4dmConfig(MethodConfig):
    """PTQ4DM's settings: 8-bit convolutions and linear layers, NDTC calibration, ranges searched by MSE, p = 2.4.

    weight_bits, activation_bits: None keeps floats. The first and the last layer have 8 bits in any case.
    samples: states to calibrate on, one from each trajectory. mean, spread: of their steps, see `NormalSteps`;
        "deviation" is the reading that fits the paper's findings, "script" what the released script does.
    metric: of the range search; the paper compares all four and takes MSE. trials: ranges tried, 1 % apart.
    rounding: "nearest", or learned with `reconstruction`. The released code can learn it and does not.
    modulation: None is the published method; with it, ranges are those of residuals, from pairs of neighbouring steps.
    attention: the paper leaves softmax and its products in full precision.

    Of the released code there is no option for: states labelled with the step counted from the wrong end, one class for
    all samples of conditional models, step indices fed without the respacing map, and ranges smoothed over batches.
    Cost: `samples` trajectories, an evaluation for each sample, and `trials` passes over the values kept of each layer.
    """

    samples: int | None = 1024
    mean: float = 0.4
    spread: Spread = "deviation"
    metric: Literal["mse", "l1", "cosine", "kl"] = "mse"
    trials: int = 100
    rounding: Literal["nearest", "learned"] = "nearest"
    reconstruction: ReconstructConfig = field(default_factory=ReconstructConfig)
    modulation: ModulationConfig | None = None
    attention: AttentionConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("trials", 1 <= self.trials <= 100, "1 to 100", "Each shrinks by 1 %.")
        NormalSteps(mean=self.mean, spread=self.spread)

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        return cls(samples=256, steps=50, reconstruction=ReconstructConfig.quick_weights())

    def layer(self) -> LayerConfig:
        """The config of all layers but the first and the last: one asymmetric scale a tensor, one a weight channel."""
        activation = QuantizerConfig(bits=self.activation_bits, granularity="tensor", symmetric=False, dynamic=False)
        weight = WeightConfig(bits=self.weight_bits, search="mse")
        return LayerConfig(weight=weight, activation=activation, modulation=self.modulation)

    def observer(self, axis: int | None) -> Observer:
        """What turns the values of one layer into a range."""
        return RangeSearchObserver(axis, RANGE_METRICS[self.metric], self.trials)


@register(Ptq4dmConfig)
def ptq4dm(job: MethodJob, config: Ptq4dmConfig) -> MethodReport:
    """Ranges from states drawn by NDTC."""
    calls = job.collect(NormalSteps(mean=config.mean, spread=config.spread), pairs=config.modulation is not None)
    layer = config.layer()
    overrides = boundary_overrides(job.model, layer)
    report = job.apply(every_layer(layer, overrides=overrides, attention=config.attention))
    weights = job.learn(calls, config.reconstruction, "weights") if config.rounding == "learned" else None
    job.keep_rounding()
    if config.activation_bits is not None:
        job.measure(calls, config.observer)
    return MethodReport.of(report, weights=weights)
