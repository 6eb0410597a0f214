"""Q-Diffusion: calibrate on groups of steps, learn rounding and scales block by block (Li et al., ICCV 2023)."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn

from modiff.calibration.timesteps import EveryStep, UniformGroups
from modiff.config import AttentionConfig, ModiffConfig, ModulationConfig, WeightSearch
from modiff.methods.recipe import LearnedConfig, MethodJob, MethodReport, every_layer
from modiff.methods.registry import register


@dataclass(frozen=True, kw_only=True)
class QDiffusionConfig(LearnedConfig):
    """Q-Diffusion's settings: 4-bit weights, 8-bit activations, all layers, attention products as well.

    weight_bits, activation_bits: None keeps floats. No layer is exempt, neither the first nor the last.
    search: of weight ranges where rounding starts; the paper's is the least error, p = 2.4.
    scales: "learned" with `learning`, or as "measured", from minimum to maximum.
    attention: "quantized" quantizes q, k, v with `activation_bits` and the softmax outputs, from zero up, with 8 bits.
        "full_precision" leaves both products alone.
    modulation: None is the published method; with it, layers quantize residuals: their scales are learned from pairs of
        steps, layer by layer, while those of attention stay as measured.

    Weights are symmetric here, in the paper they have a zero point: with one, integer products need a correction for
    each row of activations. Both have a scale for each output channel.
    Cost: `samples` trajectories, block reconstruction of weights and then of scales on `groups` x `samples` states.
    """

    weight_bits: int | None = 4
    search: WeightSearch = "mse"
    scales: Literal["learned", "measured"] = "learned"
    attention: Literal["quantized", "full_precision"] = "quantized"
    modulation: ModulationConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("groups", self.modulation is None or self.groups >= 2, "2 or more with modulation",
                   "The first group is of the first step, and nothing changed before it.")  # fmt: skip

    def model_config(self, model: nn.Module, step_bits: tuple[int, ...] = ()) -> ModiffConfig:
        """All layers alike, and the attention products of a network that has attention; `step_bits` of activations."""
        groups = len(step_bits) or 1
        layer = self.static_layer(self.modulation, step_groups=groups, step_bits=step_bits, search=self.search)
        attention = None
        has_attention = any(hasattr(module, "processor") for module in model.modules())  # as diffusers' modules have
        if self.attention == "quantized" and self.activation_bits is not None and has_attention:
            softmax = dataclasses.replace(layer.activation, bits=8, lowest="zero", step_groups=1, step_bits=())
            attention = AttentionConfig(operands=layer.activation, softmax=softmax)
        return every_layer(layer, attention=attention)


@register(QDiffusionConfig)
def q_diffusion(job: MethodJob, config: QDiffusionConfig) -> MethodReport:
    """Ranges from calibration data, then rounding by blocks, then scales by blocks."""
    return learn_layers(job, config, config.model_config(job.model))


def learn_layers(job: MethodJob, config: QDiffusionConfig, layers: ModiffConfig) -> MethodReport:
    """As `q_diffusion`, with layers configured otherwise."""
    one_set = layers.layer.activation.step_groups == 1
    states = UniformGroups(groups=min(config.groups, job.evaluations)) if one_set else EveryStep()
    calls = job.collect(states, pairs=config.modulation is not None)
    report = job.apply(layers)
    weights = scales = None
    if config.learns_weights:
        weights = job.learn(calls, config.reconstruction, "weights")
    job.keep_rounding()
    if config.activation_bits is not None:
        job.measure(calls)
        if config.scales == "learned":
            learning = config.learning if config.modulation is None else config.learning.for_residuals()
            scales = job.learn(calls, learning, "scales")
    return MethodReport.of(report, weights=weights, scales=scales)
