"""Q-Diffusion: calibrate on groups of steps, learn rounding and scales block by block (Li et al., ICCV 2023)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, Self

from torch import nn

from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.timesteps import UniformGroups
from modiff.config import (
    AttentionConfig,
    LayerConfig,
    ModiffConfig,
    ModulationConfig,
    QuantizerConfig,
    WeightConfig,
    WeightSearch,
)
from modiff.methods.recipe import MethodConfig, MethodJob, MethodReport, every_layer
from modiff.methods.registry import register


@dataclass(frozen=True, kw_only=True)
class QDiffusionConfig(MethodConfig):
    """Q-Diffusion's settings: 4-bit weights, 8-bit activations, all layers, attention products as well.

    weight_bits, activation_bits: None keeps floats. No layer is exempt, neither the first nor the last.
    groups: equally spaced steps whose states are kept. samples: states of each (the paper: 20 x 256).
    search: of weight ranges where rounding starts; the paper's is the least error, p = 2.4.
    rounding: "learned" with `reconstruction` (AdaRound by blocks), or "nearest".
    scales: "learned" with `learning` (Adam 4e-4 to 0, p = 2.4), or as "measured", from minimum to maximum.
    attention: "quantized" quantizes q, k, v with `activation_bits` and the softmax outputs, from zero up, with 8 bits.
        "full_precision" leaves both products alone.
    modulation: None is the published method; with it, layers quantize residuals: their scales are learned from pairs of
        steps, layer by layer, while those of attention stay as measured.

    Weights are symmetric here, in the paper they have a zero point: with one, integer products need a correction for
    each row of activations. Both have a scale for each output channel.
    Cost: `samples` trajectories, block reconstruction of weights and then of scales on `groups` x `samples` states.
    """

    weight_bits: int | None = 4
    groups: int = 20
    search: WeightSearch = "mse"
    rounding: Literal["learned", "nearest"] = "learned"
    reconstruction: ReconstructConfig = field(default_factory=ReconstructConfig.weights)
    scales: Literal["learned", "measured"] = "learned"
    learning: ReconstructConfig = field(default_factory=ReconstructConfig.activation_scales)
    attention: Literal["quantized", "full_precision"] = "quantized"
    modulation: ModulationConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_groups(self.groups)
        self.check_learning("reconstruction", "weights")
        self.check_learning("learning", "activation_scales")

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        weights, scales = ReconstructConfig.quick_weights(), ReconstructConfig.quick_activation_scales()
        return cls(steps=50, groups=10, samples=16, batch=16, reconstruction=weights, learning=scales)

    def model_config(self, model: nn.Module) -> ModiffConfig:
        """All layers alike, and the attention products of a network that has attention."""
        activation = QuantizerConfig(bits=self.activation_bits, granularity="tensor", symmetric=False, dynamic=False)
        weight = WeightConfig(bits=self.weight_bits, search=self.search)
        attention = None
        if self.attention == "quantized" and self.activation_bits is not None and _has_attention(model):
            softmax = dataclasses.replace(activation, bits=8, lowest="zero")
            attention = AttentionConfig(operands=activation, softmax=softmax)
        layer = LayerConfig(weight=weight, activation=activation, modulation=self.modulation)
        return every_layer(layer, attention=attention)


@register(QDiffusionConfig)
def q_diffusion(job: MethodJob, config: QDiffusionConfig) -> MethodReport:
    """Ranges from calibration data, then rounding by blocks, then scales by blocks."""
    calls = job.collect(UniformGroups(groups=min(config.groups, job.evaluations)), pairs=config.modulation is not None)
    report = job.apply(config.model_config(job.model))
    weights = scales = None
    if config.weight_bits is not None and config.rounding == "learned":
        weights = job.learn(calls, config.reconstruction, "weights")
    job.keep_rounding()
    if config.activation_bits is not None:
        job.measure(calls)
        if config.scales == "learned":
            learning = config.learning if config.modulation is None else config.learning.for_residuals()
            scales = job.learn(calls, learning, "scales")
    return MethodReport.of(report, weights=weights, scales=scales)


def _has_attention(model: nn.Module) -> bool:
    """Whether diffusers' attention modules, which hold a processor, are in the network."""
    return any(hasattr(module, "processor") for module in model.modules())
