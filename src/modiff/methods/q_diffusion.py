"""Q-Diffusion: calibrate on groups of steps, learn rounding and step sizes block by block (Li et al., ICCV 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from torch import nn

from modiff.api import apply, calibrate, collect, reconstruct
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.replay import replay
from modiff.calibration.timesteps import UniformGroups
from modiff.config import (
    AttentionConfig,
    Automatic,
    JsonConfig,
    LayerConfig,
    ModiffConfig,
    ModulationConfig,
    QuantizerConfig,
    WeightConfig,
    WeightSearch,
    check,
    is_bits,
)
from modiff.methods.learned_report import LearnedReport
from modiff.methods.parts import keep_rounding, plain_network, trajectories_of, undone_on_error
from modiff.methods.work import claim_work
from modiff.model.calibrate import ObserverName


@dataclass(frozen=True, kw_only=True)
class QDiffusionConfig(JsonConfig):
    """Q-Diffusion's settings: 4-bit weights, 8-bit activations, all layers, attention products as well.

    weight_bits, activation_bits: None keeps floats. No layer is exempt, neither the first nor the last.
    steps: of the sampler, the same that will be used. groups: equally spaced steps whose states are kept. samples:
        states of each (the paper: 20 x 256). batch: trajectories at a time.
    search: of weight ranges where rounding starts; the paper's is the least error, p = 2.4.
    rounding: "learned" with `reconstruction` (AdaRound by blocks), or "nearest".
    observer: of the activation ranges where step sizes start: the code takes "minmax" for CIFAR-10, "mse" for latent
        models, "moving_average" (0.95) for bedrooms.
    symmetric: of activations. The paper's quantizer has a zero point, the default; the code runs CIFAR-10 and bedrooms
        symmetric.
    scales: "learned" with `learning` (step sizes, Adam 4e-4 to 0, p = 2.4), or as "measured".
    attention: "quantized" codes q, k, v with `activation_bits` and the softmax outputs, from zero up, with
        `softmax_bits`: 8, 16 for Stable Diffusion. "full_precision" leaves both products alone.
    split_shortcuts: "auto" gives both halves of a concatenated skip input quantizers of their own.
    modulation: None is the published method; with it, layers code residuals: their step sizes are learned from pairs of
        steps, layer by layer, while those of attention stay as measured.
    seed: of noise and classes.

    Weights are symmetric here, in the paper they have a zero point: with one, integer products need a correction for
    each row of activations. Both have a scale for each output channel.
    """

    weight_bits: int | None = 4
    activation_bits: int | None = 8
    steps: int = 100
    groups: int = 20
    samples: int = 256
    batch: int = 32
    search: WeightSearch = "mse"
    rounding: Literal["learned", "nearest"] = "learned"
    reconstruction: ReconstructConfig = field(default_factory=ReconstructConfig.weights)
    observer: ObserverName = "minmax"
    symmetric: bool = False
    scales: Literal["learned", "measured"] = "learned"
    learning: ReconstructConfig = field(default_factory=ReconstructConfig.activation_scales)
    attention: Literal["quantized", "full_precision"] = "quantized"
    softmax_bits: int = 8
    split_shortcuts: Automatic = "auto"
    modulation: ModulationConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_bits", "activation_bits"):
            check(f"QDiffusionConfig.{name}", getattr(self, name), is_bits(getattr(self, name)), "None or 2 to 8",
                  "Q-Diffusion is made for 4 and 8.")  # fmt: skip
        check("QDiffusionConfig.softmax_bits", self.softmax_bits, is_bits(self.softmax_bits, (16,)), "2 to 8, or 16",
              "Use attention='full_precision' for floats.")  # fmt: skip
        check_calibration("QDiffusionConfig", self.steps, self.groups, self.samples, self.batch)
        for name, wanted in (("reconstruction", "weights"), ("learning", "activation_scales")):
            learn = getattr(self, name).learn
            check(f"QDiffusionConfig.{name}.learn", learn, learn == wanted, repr(wanted),
                  f"Start from ReconstructConfig.{wanted}().")  # fmt: skip

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        return cls(
            steps=50,
            groups=10,
            samples=16,
            batch=16,
            reconstruction=ReconstructConfig.quick_weights(),
            learning=ReconstructConfig.quick_activation_scales(),
        )

    @classmethod
    def stable_diffusion(cls) -> Self:
        """The code's settings there: 25 x 128 states with both branches of guidance, a 16-bit softmax, batches of 8."""
        return cls(
            steps=50,
            groups=25,
            samples=128,
            batch=8,
            reconstruction=dataclasses.replace(ReconstructConfig.weights(), batch=8),
            learning=dataclasses.replace(ReconstructConfig.activation_scales(), batch=8),
            observer="mse",
            softmax_bits=16,
        )

    def model_config(self, model: nn.Module) -> ModiffConfig:
        """All layers alike, and the attention products of a network that has attention."""
        activation = QuantizerConfig(
            bits=self.activation_bits, granularity="tensor", symmetric=self.symmetric, dynamic=False
        )
        weight = WeightConfig(bits=self.weight_bits, search=self.search)
        attention = None
        if self.attention == "quantized" and self.activation_bits is not None and _has_attention(model):
            softmax = dataclasses.replace(activation, bits=self.softmax_bits, symmetric=False, lowest="zero")
            attention = AttentionConfig(operands=activation, softmax=softmax)
        return ModiffConfig(
            layer=LayerConfig(weight=weight, activation=activation, modulation=self.modulation),
            exclude=(),
            first_last="quantize",
            min_weights=0,
            split_shortcuts=self.split_shortcuts,
            attention=attention,
        )


def apply_q_diffusion(
    pipe: Any,
    config: QDiffusionConfig | None = None,
    *,
    run: Callable[[int], object] | None = None,
    evaluations_per_run: int | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> LearnedReport:
    """Quantize a pipeline's denoiser by Q-Diffusion, in place; `modiff.remove(pipe)` undoes it.

    Args:
        pipe: a pipeline, or a module together with `run` and `evaluations_per_run`.
        run: `run(i)` generates the `config.batch` images of trajectory i; needed where the pipeline takes a prompt.
        evaluations_per_run: of the network in a trajectory; asked of the scheduler when None.
        folder: keeps the calibration data and each learned unit, so that an interrupted job goes on.
    Returns: what was quantized and what was left, and the loss of each unit before and after it was learned.
    Raises: ConfigError, CalibrationError or StateError if the model cannot be calibrated so; it is as before then.
    Cost: `samples` trajectories, block reconstruction of weights and then of step sizes on `groups` x `samples` states.
    """
    config = config or QDiffusionConfig()
    model = plain_network(pipe, "apply_q_diffusion")
    work = claim_work(folder, pipe, "q_diffusion", config)
    chosen = config.model_config(model)
    run, steps = trajectories_of(
        pipe, run, evaluations_per_run, steps=config.steps, batch=config.batch, seed=config.seed
    )
    calls = collect(
        pipe,
        run,
        trajectories=config.samples // config.batch,
        batch=config.batch,
        steps=steps,
        sampler=UniformGroups(groups=min(config.groups, steps)),
        pairs=config.modulation is not None,
        seed=config.seed,
        folder=None if work is None else work / "calls",
        progress=progress,
    )
    report = apply(pipe, chosen)
    weights = scales = None
    with undone_on_error(pipe):
        if config.weight_bits is not None and config.rounding == "learned":
            blocks = None if work is None else work / "weights"
            weights = reconstruct(pipe, calls, config.reconstruction, folder=blocks, progress=progress)
        keep_rounding(model)
        if config.activation_bits is not None:
            calibrate(pipe, lambda: replay(model, calls, progress=progress), observer=config.observer)
            if config.scales == "learned":
                units = None if work is None else work / "scales"
                learning = config.learning if config.modulation is None else config.learning.for_residuals()
                scales = reconstruct(pipe, calls, learning, folder=units, progress=progress)
    return LearnedReport(report.entries, weights, scales)


def check_calibration(where: str, steps: int, groups: int, samples: int, batch: int) -> None:
    """Raise the ConfigError of trajectories that cannot be: `samples` in batches, `groups` of `steps`."""
    for name, value in (("steps", steps), ("groups", groups), ("samples", samples), ("batch", batch)):
        check(f"{where}.{name}", value, value >= 1, "1 or more", "Less is none.")
    check(f"{where}.samples", samples, samples % batch == 0, f"a multiple of batch={batch}",
          "Trajectories run in batches. Use samples=256, batch=32.")  # fmt: skip
    check(f"{where}.groups", groups, groups <= steps, f"at most steps={steps}", "A group has at least one step.")


def _has_attention(model: nn.Module) -> bool:
    """Whether diffusers' attention modules, which hold a processor, are in the network."""
    return any(hasattr(module, "processor") for module in model.modules())
