"""PTQ4DM: calibrate on states of the denoising process, more of them near the image (Shang et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from modiff.api import apply, calibrate, collect, reconstruct
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.replay import replay
from modiff.calibration.timesteps import NormalSteps, Spread
from modiff.config import (
    AttentionConfig,
    JsonConfig,
    LayerConfig,
    ModiffConfig,
    ModulationConfig,
    QuantizerConfig,
    WeightConfig,
    check,
    is_bits,
)
from modiff.core.affine import QParams, qparams_from_range
from modiff.core.observers import Observer, RangeSearchObserver
from modiff.core.range_metrics import RANGE_METRICS, RangeMetric
from modiff.methods.parts import boundary_overrides, keep_rounding, plain_network, trajectories_of, undone_on_error
from modiff.methods.work import claim_work
from modiff.model.report import Report

MOMENTUM = 0.9
KEPT_OF_A_CALL = 1 << 13


@dataclass(frozen=True, kw_only=True)
class Ptq4dmConfig(JsonConfig):
    """PTQ4DM's settings: 8-bit convolutions and linear layers, NDTC calibration, ranges searched by MSE, p = 2.4.

    weight_bits, activation_bits: None keeps floats. The first and the last layer have 8 bits in any case.
    samples: states to calibrate on (the paper: 1024), one from each trajectory. batch: trajectories at a time.
    steps: of the sampler, the same that will be used. mean, spread: of the steps, see `NormalSteps`; "deviation" is the
        reading that fits the paper's findings, "script" what the released script does.
    metric: of the range search; the paper compares all four and takes MSE. trials: ranges tried, 1 % apart.
    smoothing: "none" searches one range over all samples; "script" searches one for each batch and averages them with
        weights 0.9 and 0.1, as the released code does.
    rounding: "nearest", or learned with `reconstruction`. The released code can learn it and does not.
    modulation: None is the published method; with it, ranges are those of residuals, from pairs of neighbouring steps.
    attention: the paper leaves softmax and its products in full precision.
    seed: of noise, classes and steps.

    Defects of the released code that have no option here: states labelled with the step counted from the wrong end,
    one class for all samples of conditional models, and step indices fed without the respacing map.
    """

    weight_bits: int | None = 8
    activation_bits: int | None = 8
    samples: int = 1024
    batch: int = 32
    steps: int = 100
    mean: float = 0.4
    spread: Spread = "deviation"
    metric: Literal["mse", "l1", "cosine", "kl"] = "mse"
    trials: int = 100
    smoothing: Literal["none", "script"] = "none"
    rounding: Literal["nearest", "learned"] = "nearest"
    reconstruction: ReconstructConfig = field(default_factory=ReconstructConfig)
    modulation: ModulationConfig | None = None
    attention: AttentionConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_bits", "activation_bits"):
            check(f"Ptq4dmConfig.{name}", getattr(self, name), is_bits(getattr(self, name)), "None or 2 to 8",
                  "PTQ4DM is made for 8.")  # fmt: skip
        for name in ("samples", "batch", "steps"):
            check(f"Ptq4dmConfig.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more", "Less is none.")
        check("Ptq4dmConfig.samples", self.samples, self.samples % self.batch == 0, f"a multiple of batch={self.batch}",
              "Trajectories run in batches. Use samples=1024, batch=32.")  # fmt: skip
        check("Ptq4dmConfig.trials", self.trials, 1 <= self.trials <= 100, "1 to 100", "Each shrinks by 1 %.")
        NormalSteps(mean=self.mean, spread=self.spread)

    def layer(self) -> LayerConfig:
        """The config of all layers but the first and the last: one asymmetric scale a tensor, one a weight channel."""
        activation = QuantizerConfig(
            bits=self.activation_bits, granularity="tensor", symmetric=False, dynamic=False
        )  # fmt: skip
        weight = WeightConfig(bits=self.weight_bits, search="mse")
        return LayerConfig(weight=weight, activation=activation, modulation=self.modulation)


def apply_ptq4dm(
    pipe: Any,
    config: Ptq4dmConfig | None = None,
    *,
    run: Callable[[int], object] | None = None,
    evaluations_per_run: int | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Quantize a pipeline's denoiser by PTQ4DM, in place; `modiff.remove(pipe)` undoes it.

    Args:
        pipe: a pipeline, or a module together with `run` and `evaluations_per_run`.
        run: `run(i)` generates the `config.batch` images of trajectory i; needed where the pipeline takes a prompt.
        evaluations_per_run: of the network in a trajectory; asked of the scheduler when None.
        folder: keeps the calibration data, so that an interrupted job goes on.
    Returns: what was quantized and what was left.
    Raises: ConfigError, CalibrationError or StateError if the model cannot be calibrated so; it is as before then.
    Cost: `samples` trajectories, an evaluation for each sample, and `trials` passes over the values kept of each layer.
    """
    config = config or Ptq4dmConfig()
    model = plain_network(pipe, "apply_ptq4dm")
    work = claim_work(folder, pipe, "ptq4dm", config)
    run, steps = trajectories_of(
        pipe, run, evaluations_per_run, steps=config.steps, batch=config.batch, seed=config.seed
    )
    calls = collect(
        pipe,
        run,
        trajectories=config.samples // config.batch,
        batch=config.batch,
        steps=steps,
        sampler=NormalSteps(mean=config.mean, spread=config.spread),
        pairs=config.modulation is not None,
        seed=config.seed,
        folder=work,
        progress=progress,
    )
    layer = config.layer()
    chosen = ModiffConfig(
        layer=layer,
        exclude=(),
        overrides=boundary_overrides(model, layer),
        first_last="quantize",
        min_weights=0,
        attention=config.attention,
    )
    report = apply(pipe, chosen)
    with undone_on_error(pipe):
        if config.rounding == "learned":
            reconstruct(pipe, calls, config.reconstruction, progress=progress)
        keep_rounding(model)
        if config.activation_bits is not None:
            calibrate(pipe, lambda: replay(model, calls, progress=progress), observer=_observers(config))
    return report


def _observers(config: Ptq4dmConfig) -> Callable[[int | None], Observer]:
    metric = RANGE_METRICS[config.metric]
    if config.smoothing == "script":
        return lambda axis: SmoothedSearchObserver(axis, metric, config.trials)
    return lambda axis: RangeSearchObserver(axis, metric, config.trials)


class SmoothedSearchObserver(Observer):
    """The released code's range: the best one of each call, smoothed over the calls, range <- 0.9 range + 0.1 new."""

    def __init__(self, channel_dim: int | None, metric: RangeMetric, trials: int) -> None:
        super().__init__(channel_dim)
        self.metric, self.trials = metric, trials
        self._calls: list[RangeSearchObserver] = []

    def observe(self, x: Tensor) -> None:
        """Take one call into account; at most `KEPT_OF_A_CALL` of its values are kept."""
        super().observe(x)
        one = RangeSearchObserver(self.channel_dim, self.metric, self.trials, keep=KEPT_OF_A_CALL)
        one.observe(x)
        self._calls.append(one)

    def qparams(self, bits: int, *, symmetric: bool = True, clip: float = 1.0) -> QParams:
        """Scale and zero point of the smoothed range."""
        self.range()
        ranges = [call.searched(bits, symmetric=symmetric, clip=clip) for call in self._calls]
        low, high = ranges[0]
        for new_low, new_high in ranges[1:]:
            low, high = low.lerp(new_low, 1 - MOMENTUM), high.lerp(new_high, 1 - MOMENTUM)
        return qparams_from_range(low, high, bits, symmetric=symmetric, clip=clip)
