"""MoDiff: quantize the change between steps, with dynamic or static scales (Gao et al., ICML 2025)."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from modiff.api import calibrate, trajectory
from modiff.calibration.data import Call, calls_with_previous, largest_step
from modiff.calibration.reconstruct.layers import Trainee, evaluating, full_precision
from modiff.calibration.timesteps import UniformGroups
from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig, WeightSearch
from modiff.core.step_sets import StepSizes
from modiff.errors import CalibrationError
from modiff.methods.recipe import LearnedConfig, MethodJob, MethodReport, every_layer
from modiff.methods.registry import register
from modiff.model.attach import required_attachment
from modiff.model.calibrate import measure_scales
from modiff.model.observe import observe
from modiff.progress import Bar

Kind = Literal["dynamic", "static_minmax", "static_learned", "static_steps"]
_PUBLISHED = ModulationConfig(anchor_weights="quantized")


@dataclass(frozen=True, kw_only=True)
class ModiffMethodConfig(LearnedConfig):
    """MoDiff's settings: 8-bit weights, residuals in 8 bits or fewer, all linear layers and convolutions.

    kind: of the residuals' scales. "dynamic" measures each residual (the paper's LCQ and LTQ). "static_minmax" has one
        scale per layer that covers every residual of the calibration set. "static_learned" starts there and learns the
        scale, layer by layer, on pairs of neighbouring steps (the paper's Q-Diff + MoDiff). "static_steps", which is
        ours, measures the residuals of modulated trajectories, a scale for each of `step_groups` groups of
        neighbouring steps: one scale for all is made for the largest step and too coarse for the others.
    weight_bits, activation_bits: None keeps floats.
    modulation: of the loop; the paper's first step has full-precision inputs and quantized weights.
    samples: None takes the code's, 32 for "static_minmax" and "static_steps", 256 otherwise.
    step_groups: of "static_steps"; 0 is a scale for each step. They serve only the steps that they were measured at.
    search: of weight ranges where rounding starts. With exact anchors and rounding to nearest "minmax" is better.
    rounding: "learned", as MoDiff takes Q-Diffusion's checkpoints. learning: the code has p = 2 for latent models.

    Dynamic scales are per token and per sample, static ones per tensor, max|r| / (2^(b-1) - 1), one for each half of a
    split shortcut. Not taken over from the released code: scales of (max - min) / (levels - 1) with half the levels,
    which throw away one bit, and pairs of a first step with itself, whose residual is zero.
    Cost: none for dynamic scales with weights rounded to nearest. Otherwise `samples` trajectories; two evaluations of
        each state for static scales, or `samples` modulated trajectories for "static_steps"; block reconstruction of
        weights and of each layer's scale where they are learned.
    """

    kind: Kind = "dynamic"
    modulation: ModulationConfig = _PUBLISHED
    samples: int | None = None
    step_groups: int = 10
    search: WeightSearch = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        static = self.kind != "dynamic"
        self.check("activation_bits", not static or self.activation_bits is not None,
                   f"2 to 8 with kind={self.kind!r}", "Floats have no scale. Use kind='dynamic'.")  # fmt: skip
        self.check("step_groups", self.step_groups >= 0, "0 or more groups", "0 is a scale for each step.")
        hold = self.modulation.predictor == "hold"
        self.check("modulation", hold or self.kind in ("dynamic", "static_steps"),
                   f"predictor='hold' with kind={self.kind!r}", "Ranges are those of a change.")  # fmt: skip
        self.model_config()

    @property
    def drawn(self) -> int:
        """Samples of each group."""
        few = 32 if self.kind in ("static_minmax", "static_steps") else 256
        return few if self.samples is None else self.samples

    @property
    def pairs(self) -> bool:
        """Whether calibration looks at residuals of full precision."""
        return self.kind in ("static_minmax", "static_learned")

    def model_config(self) -> ModiffConfig:
        """All layers alike."""
        static = self.kind != "dynamic"
        activation = QuantizerConfig(
            bits=self.activation_bits, granularity="tensor" if static else "auto", dynamic=not static,
            step_groups=self.step_groups if self.kind == "static_steps" else 1,
        )  # fmt: skip
        weight = WeightConfig(bits=self.weight_bits, search=self.search)
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
    for i in range(config.drawn // config.batch):
        with trajectory(job.target) if isinstance(job.target, nn.Module) else nullcontext():
            job.run(i)


@torch.inference_mode(False)
def measure_residuals(model: nn.Module, calls: Sequence[Call], *, progress: bool = False) -> None:
    """Set the static scales of modulated layers to max|a_t - a_{t+1}| / qmax over the calls, in full precision.

    Calls of a first step have no residual, and are left out.
    Raises: CalibrationError if no call holds the one before it, or a layer never ran; scales stay as they were then.
    Cost: two evaluations a call; in memory, the inputs of all layers in two evaluations.
    """
    calls = calls_with_previous("measure_residuals", calls)
    attachment = required_attachment(model, "measure_residuals")
    layers = {name: layer for name, layer in attachment.layers.items() if layer.quantizer is not None}
    trainees = {name: Trainee(layer, "quantized") for name, layer in layers.items()}

    def show() -> None:
        with evaluating(model), full_precision(model), torch.no_grad():
            for call in Bar(calls, desc="residuals", unit="call", shown=progress):
                before, now = (_inputs(model, trainees, c) for c in (call.previous, call) if c is not None)
                for name, layer in layers.items():
                    if len(before[name]) != len(now[name]):
                        raise CalibrationError(
                            f"{name}: expected as many calls in both steps, got {len(before[name])} and "
                            f"{len(now[name])}. The network branches on values. Exclude the layer."
                        )
                    for first, second in zip(before[name], now[name], strict=True):
                        layer.quantizer(second - first)

    measure_scales(model, show)
    attachment.step_sizes = StepSizes(largest_step(calls))


def _inputs(model: nn.Module, trainees: Mapping[str, Trainee], call: Call) -> dict[str, list[Tensor]]:
    inputs: dict[str, list[Tensor]] = {name: [] for name in trainees}

    def keep(name: str, _layer: nn.Module, args: tuple[Tensor, ...], _kwargs: object) -> None:
        inputs[name].append(trainees[name].prepare(args[0].detach()).clone())  # it may be written in place later

    with observe(model, layers=trainees, before_layer=keep):
        call.evaluate(model)
    return inputs
