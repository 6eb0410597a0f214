"""MoDiff: code the change between steps, with dynamic or static scales (Gao et al., ICML 2025, arXiv:2506.22463)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from torch import nn

from modiff.api import apply, calibrate, collect, reconstruct, trajectory
from modiff.calibration.data import CalibrationSet
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.timesteps import UniformGroups
from modiff.config import (
    AttentionConfig,
    Granularity,
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
from modiff.methods.q_diffusion import check_calibration
from modiff.methods.residual_ranges import Halves, measure_residuals
from modiff.methods.work import claim_work

Kind = Literal["dynamic", "static_minmax", "static_learned", "static_steps"]


@dataclass(frozen=True, kw_only=True)
class ModiffMethodConfig(JsonConfig):
    """MoDiff's settings: 8-bit weights, residuals in 8 bits or fewer, all linear layers and convolutions.

    kind: of the residuals' scales. "dynamic" measures each residual (the paper's LCQ and LTQ). "static_minmax" has one
        scale per layer that covers every residual of the calibration set. "static_learned" starts there and learns the
        step size, layer by layer, on pairs of neighbouring steps (the paper's Q-Diff + MoDiff). "static_steps", which
        is ours, measures the residuals of modulated trajectories, a scale for each of `step_groups` groups of
        neighbouring steps: one scale for all is made for the largest step and too coarse for the others.
    weight_bits, activation_bits: None keeps floats.
    granularity: of dynamic scales. "auto" is per token and per sample; "sample" is the code's --act_tensor; "tensor",
        the code's default, has one scale for the batch, so an image depends on those beside it. Static scales are per
        tensor.
    symmetric: of static scales: max|r| / (2^(b-1) - 1), or with a zero point (max r - min r) / (2^b - 1).
    halves: of a split shortcut's static scales. "own": one each, the paper's. "shared": both start at the code's, the
        range of the whole input.
    modulation: of the loop; the paper's first step has full-precision inputs and quantized weights.
    layers: "all" is the paper's and the code's; "recommended" leaves out what ModiffConfig leaves out by default: time
        and prompt embeddings, the first and the last layer.
    attention: the paper and the code leave the attention products in full precision; dynamic quantizers only.
    steps: of the sampler, the same that will be used. groups: equally spaced steps that residuals and states are kept
        of. samples: states of each; None takes the code's, 32 for "static_minmax" and 256 else. batch: at a time.
    step_groups: of "static_steps"; 0 is a scale for each step. They serve only the steps that they were measured at.
    rounding: of weights. "learned" with `reconstruction`: MoDiff takes Q-Diffusion's checkpoints. "nearest": `search`
        says how ranges are found.
    learning: of the step sizes (Adam 4e-4 to 0, p = 2.4; the code has p = 2 for latent models).
    seed: of noise and classes.

    Defects of the released code that have no option here: symmetric scales of (max - min) / (levels - 1) with half the
    levels, which throw away one bit and divide by zero at 2 bits; zero points that are not those of the new scale; and
    pairs of a first step with itself, whose residual is zero.
    """

    kind: Kind = "dynamic"
    weight_bits: int | None = 8
    activation_bits: int | None = 8
    granularity: Granularity = "auto"
    symmetric: bool = True
    halves: Halves = "own"
    modulation: ModulationConfig = field(default_factory=lambda: ModulationConfig(anchor_weights="quantized"))
    layers: Literal["all", "recommended"] = "all"
    attention: AttentionConfig | None = None
    steps: int = 100
    groups: int = 20
    samples: int | None = None
    batch: int = 32
    step_groups: int = 10
    search: WeightSearch = "mse"
    rounding: Literal["learned", "nearest"] = "learned"
    reconstruction: ReconstructConfig = field(default_factory=ReconstructConfig.weights)
    learning: ReconstructConfig = field(default_factory=ReconstructConfig.activation_scales)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "ModiffMethodConfig"
        for name in ("weight_bits", "activation_bits"):
            check(f"{where}.{name}", getattr(self, name), is_bits(getattr(self, name)), "None or 2 to 8",
                  "MoDiff is made for 8 down to 3.")  # fmt: skip
        check_calibration(where, self.steps, self.groups, self.drawn, self.batch)
        static = self.kind != "dynamic"
        check(f"{where}.granularity", self.granularity, not static or self.granularity == "auto",
              f"'auto' with kind={self.kind!r}", "Static scales are one per layer.")  # fmt: skip
        check(f"{where}.activation_bits", self.activation_bits, not static or self.activation_bits is not None,
              f"2 to 8 with kind={self.kind!r}", "Floats have no scale. Use kind='dynamic'.")  # fmt: skip
        check(f"{where}.step_groups", self.step_groups, self.step_groups >= 0, "0 or more groups",
              "0 is a scale for each step.")  # fmt: skip
        hold = self.modulation.predictor == "hold" or self.kind == "static_steps"
        check(f"{where}.modulation.predictor", self.modulation.predictor, hold or not static,
              f"'hold' with kind={self.kind!r}", "Ranges are those of the change between two steps.")  # fmt: skip
        parts = () if self.attention is None else (self.attention.operands, self.attention.softmax)
        check(f"{where}.attention", self.attention, all(q.dynamic or q.bits is None for q in parts),
              "dynamic quantizers", "The pairs measure residuals; attention has none.")  # fmt: skip
        for name, wanted in (("reconstruction", "weights"), ("learning", "activation_scales")):
            learn = getattr(self, name).learn
            check(f"{where}.{name}.learn", learn, learn == wanted, repr(wanted),
                  f"Start from ReconstructConfig.{wanted}().")  # fmt: skip
        self.model_config()

    @classmethod
    def quick(cls, kind: Kind = "dynamic") -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        return cls(
            kind=kind,
            steps=50,
            groups=10,
            samples=16,
            batch=16,
            reconstruction=ReconstructConfig.quick_weights(),
            learning=ReconstructConfig.quick_activation_scales(),
        )

    @property
    def drawn(self) -> int:
        """Samples of each group."""
        return self.samples or (32 if self.kind in ("static_minmax", "static_steps") else 256)

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
            bits=self.activation_bits,
            granularity="tensor" if static else self.granularity,
            symmetric=self.symmetric,
            dynamic=not static,
            step_groups=self.step_groups if self.kind == "static_steps" else 1,
        )
        weight = WeightConfig(bits=self.weight_bits, search=self.search)
        every = self.layers == "all"
        return ModiffConfig(
            layer=LayerConfig(weight=weight, activation=activation, modulation=self.modulation),
            exclude=() if every else None,
            first_last="quantize" if every else "full_precision",
            min_weights=0 if every else 256,
            attention=self.attention,
        )


def apply_modiff(
    pipe: Any,
    config: ModiffMethodConfig | None = None,
    *,
    run: Callable[[int], object] | None = None,
    evaluations_per_run: int | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> LearnedReport:
    """Modulate a pipeline's denoiser by MoDiff, in place; `modiff.remove(pipe)` undoes it.

    Args:
        pipe: a pipeline, or a module; with `run` and `evaluations_per_run` if there is something to calibrate.
        run: `run(i)` generates the `config.batch` images of trajectory i; needed where the pipeline takes a prompt.
        evaluations_per_run: of the network in a trajectory; asked of the scheduler when None.
        folder: keeps the calibration data and each learned unit, so that an interrupted job goes on.
    Returns: what was quantized and what was left, and the loss of each unit before and after it was learned.
    Raises: ConfigError, CalibrationError or StateError if the model cannot be calibrated so; it is as before then.
    Cost: none for dynamic scales with weights rounded to nearest. Else `samples` trajectories; two evaluations of each
        state for static scales, or `samples` modulated trajectories for "static_steps"; block reconstruction of weights
        and of each layer's step size where they are learned.
    """
    config = config or ModiffMethodConfig()
    model = plain_network(pipe, "apply_modiff")
    work = claim_work(folder, pipe, "modiff", config)
    wanted = config.pairs or config.learns_weights
    calls = _calls(pipe, config, run, evaluations_per_run, work, progress) if wanted else None
    report = apply(pipe, config.model_config())
    weights = scales = None
    with undone_on_error(pipe):
        if calls is not None and config.learns_weights:
            blocks = None if work is None else work / "weights"
            weights = reconstruct(pipe, calls, config.reconstruction, folder=blocks, progress=progress)
        keep_rounding(model)
        if config.kind == "static_steps":
            calibrate(pipe, _trajectories(pipe, config, run, evaluations_per_run))
        elif calls is not None and config.pairs:
            measure_residuals(model, calls, halves=config.halves, progress=progress)
            if config.kind == "static_learned":
                units = None if work is None else work / "scales"
                scales = reconstruct(pipe, calls, config.learning.for_residuals(), folder=units, progress=progress)
    return LearnedReport(report.entries, weights, scales)


def _trajectories(
    pipe: Any | nn.Module,
    config: ModiffMethodConfig,
    run: Callable[[int], object] | None,
    evaluations_per_run: int | None,
) -> Callable[[], None]:
    """All trajectories of calibration, one after another, with scales measured at each step on the way."""
    one, _ = trajectories_of(pipe, run, evaluations_per_run, steps=config.steps, batch=config.batch, seed=config.seed)

    def loop() -> None:
        for i in range(config.drawn // config.batch):
            with trajectory(pipe) if isinstance(pipe, nn.Module) else nullcontext():
                one(i)

    return loop


def _calls(
    pipe: Any | nn.Module,
    config: ModiffMethodConfig,
    run: Callable[[int], object] | None,
    evaluations_per_run: int | None,
    work: Path | None,
    progress: bool,
) -> CalibrationSet:
    """States of equally spaced steps, and those of the steps before them for static scales."""
    run, steps = trajectories_of(
        pipe, run, evaluations_per_run, steps=config.steps, batch=config.batch, seed=config.seed
    )
    return collect(
        pipe,
        run,
        trajectories=config.drawn // config.batch,
        batch=config.batch,
        steps=steps,
        sampler=UniformGroups(groups=min(config.groups, steps)),
        pairs=config.pairs,
        seed=config.seed,
        folder=None if work is None else work / "calls",
        progress=progress,
    )
