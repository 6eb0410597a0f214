"""What all published methods share: settings, a job made of the verbs, and the report."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, Literal, Self

from torch import nn

from modiff.api import apply, calibrate, collect, reconstruct
from modiff.calibration.collect import replay
from modiff.calibration.data import CalibrationSet, Call
from modiff.calibration.reconstruct.config import ReconstructConfig, ReconstructionReport
from modiff.calibration.timesteps import StepSampler
from modiff.config import (
    AttentionConfig,
    JsonConfig,
    LayerConfig,
    ModiffConfig,
    ModulationConfig,
    QuantizerConfig,
    WeightConfig,
    WeightSearch,
    is_bits,
)
from modiff.errors import ConfigError, StateError
from modiff.hosts.host import host_of, networks_of
from modiff.model.attach import attachment_of, required_attachment
from modiff.model.calibrate import MakeObserver, ObserverName
from modiff.model.report import Report
from modiff.model.select import CANDIDATES
from modiff.nn.adapters import walk
from modiff.nn.weight import QuantizedWeight

Outcome = ReconstructionReport | None
Overrides = tuple[tuple[str, LayerConfig], ...]
Runs = Callable[[int], object] | None
"""`run(i)` generates trajectory i."""
BOUNDARY_BITS = 8
"""The published codes keep the first and the last layer of a network at 8 bits."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig(JsonConfig):
    """The settings that all methods share: bits (2 to 8; None keeps floats), and what is learned from.

    steps: of the sampler, as many as you will sample with. samples: trajectories to learn from, `batch` at a time.
    seed: of noise, classes and steps.
    """

    weight_bits: int | None = 8
    activation_bits: int | None = 8
    steps: int = 100
    samples: int | None = 256
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_bits", "activation_bits"):
            self.check(name, is_bits(getattr(self, name)), "None or 2 to 8", "Use 4 or 8.")
        for name, number in (("steps", self.steps), ("batch", self.batch), ("samples", self.drawn)):
            self.check(name, number >= 1, "1 or more", "There is nothing to learn from.")
        self.check("samples", self.drawn % self.batch == 0, f"a multiple of batch={self.batch}",
                   "Trajectories run in whole batches.")  # fmt: skip

    @property
    def drawn(self) -> int:
        """Trajectories to learn from."""
        return 256 if self.samples is None else self.samples

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size, in minutes on two cores; the published ones if not told."""
        return cls()

    def static_layer(
        self, modulation: ModulationConfig | None = None, *, step_groups: int = 1, step_bits: tuple[int, ...] = (),
        search: WeightSearch = "mse",
    ) -> LayerConfig:  # fmt: skip
        """A layer at these bits: a scale for each output channel, and an asymmetric static one for each activation."""
        activation = QuantizerConfig(bits=self.activation_bits, granularity="tensor", symmetric=False, dynamic=False,
                                     step_groups=step_groups, step_bits=step_bits)  # fmt: skip
        weight = WeightConfig(bits=self.weight_bits, search=search)
        return LayerConfig(weight=weight, activation=activation, modulation=modulation)

    def check_groups(self, groups: int) -> None:
        """Raise the ConfigError of `groups` that `steps` cannot be cut into."""
        self.check("groups", 1 <= groups <= self.steps, f"1 to {self.steps}",
                   f"A group has at least one step. Use steps={groups} or more, or fewer groups.")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LearnedConfig(MethodConfig):
    """The settings of methods that learn as Q-Diffusion does.

    groups: equally spaced steps whose states are kept. samples: states of each (Q-Diffusion: 20 x 256).
    rounding: of weights: "learned" with `reconstruction` (AdaRound by blocks), or to the "nearest".
    learning: of static scales, where they are learned (Adam 4e-4 to 0, p = 2.4).
    """

    groups: int = 20
    rounding: Literal["learned", "nearest"] = "learned"
    reconstruction: ReconstructConfig = field(default_factory=ReconstructConfig.weights)
    learning: ReconstructConfig = field(default_factory=ReconstructConfig.activation_scales)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_groups(self.groups)
        self.check("reconstruction.learn", self.reconstruction.learn == "weights", "'weights'",
                   "Start from ReconstructConfig.weights().")  # fmt: skip
        self.check("learning.learn", self.learning.learn == "activation_scales", "'activation_scales'",
                   "Start from ReconstructConfig.activation_scales().")  # fmt: skip

    @classmethod
    def quick(cls) -> Self:
        """For the embedded model and others of its size, in minutes on two cores."""
        weights, scales = ReconstructConfig.quick_weights(), ReconstructConfig.quick_activation_scales()
        return cls(steps=50, groups=10, samples=16, batch=16, reconstruction=weights, learning=scales)

    @property
    def learns_weights(self) -> bool:
        """Whether rounding is learned."""
        return self.weight_bits is not None and self.rounding == "learned"


def every_layer(
    layer: LayerConfig, *, overrides: Overrides = (), attention: AttentionConfig | None = None
) -> ModiffConfig:
    """`layer` for all layers, the first and the last among them, as the published codes have it."""
    return ModiffConfig(layer=layer, overrides=overrides, attention=attention, default_exclude=(),
                        first_last="quantize", min_weights=0)  # fmt: skip


def boundary_overrides(model: nn.Module, layer: LayerConfig) -> Overrides:
    """`layer` with 8 bits for the first and the last layer of the network; floats stay floats."""
    names = [name for name, module, theirs in walk(model) if isinstance(module, CANDIDATES) and not theirs]

    def raised(config: Any) -> Any:
        return config if config.bits is None else dataclasses.replace(config, bits=BOUNDARY_BITS)

    boundary = dataclasses.replace(layer, weight=raised(layer.weight), activation=raised(layer.activation))
    return tuple((escape(name), boundary) for name in dict.fromkeys([*names[:1], *names[-1:]]))


@dataclass(frozen=True)
class MethodReport(Report):
    """The layers, and what was learned; None where nothing was to be learned.

    weights: units whose rounding was learned. scales: units, or groups of steps, whose static scales were.
    """

    weights: Outcome = None
    scales: Outcome = None

    @classmethod
    def of(cls, report: Report, *, weights: Outcome = None, scales: Outcome = None) -> Self:
        """What `apply` reported, with what was learned."""
        return cls(report.entries, report.memory, weights, scales)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON."""
        learned = {"weights": self.weights, "scales": self.scales}
        return super().to_dict() | {n: None if r is None else r.to_dict()["units"] for n, r in learned.items()}

    def __str__(self) -> str:
        learned = {"Rounding of weights": self.weights, "Static scales": self.scales}
        return "\n".join([super().__str__(), *(f"{name}: {report}" for name, report in learned.items() if report)])


class MethodJob:
    """A pipeline or module, its network `model`, and the verbs on it, with a method's settings and its folder."""

    def __init__(
        self, target: Any, config: MethodConfig, run: Runs, evaluations: int | None, folder: Path | None, progress: bool
    ) -> None:
        self.target, self.model = target, plain_network(target, type(config).__name__)
        self.config, self.folder, self.progress = config, folder, progress
        self._run, self._evaluations = run, evaluations

    def path(self, name: str) -> Path | None:
        """Where the job keeps something; None without a folder."""
        return None if self.folder is None else self.folder / name

    @property
    def evaluations(self) -> int:
        """How often a trajectory evaluates the network. Raises: ConfigError where a module alone cannot say."""
        return self._evaluations or host_of(self.target).evaluations(self.target, self.config.steps)

    def run(self, index: int) -> object:
        """Run trajectory `index`. Raises: ConfigError where a module alone, or a pipeline with a prompt, cannot."""
        if self._run is None:
            c = self.config
            self._run = host_of(self.target).run(self.target, steps=c.steps, batch=c.batch, seed=c.seed)
        return self._run(index)

    def collect(self, sampler: StepSampler | None, *, pairs: bool = False, run: Runs = None) -> CalibrationSet:
        """The full-precision calls that `sampler` chooses, or all, of `drawn` trajectories by `run`, or `self.run`."""
        c = self.config
        return collect(
            self.target, run or self.run, trajectories=c.drawn // c.batch, batch=None if sampler is None else c.batch,
            steps=self.evaluations, sampler=sampler, pairs=pairs, seed=c.seed, folder=self.path("calls"),
            progress=self.progress,
        )  # fmt: skip

    def apply(self, config: ModiffConfig) -> Report:
        """Quantize the target; it is as before if the method fails later."""
        return apply(self.target, config)

    def learn(self, calls: Sequence[Call], config: ReconstructConfig, name: str) -> ReconstructionReport:
        """Reconstruct the target; finished units are kept under `name`."""
        return reconstruct(self.target, calls, config, folder=self.path(name), progress=self.progress)

    def measure(self, calls: Sequence[Call], observer: ObserverName | MakeObserver = "minmax") -> None:
        """Measure the static scales on the calls."""
        calibrate(self.target, lambda: replay(self.model, calls, progress=self.progress), observer=observer)

    def keep_rounding(self) -> None:
        """Keep the present codes of all weights, as if they were learned: no other weight is taken for them."""
        for layer in required_attachment(self.model, "keep_rounding").layers.values():
            weight = layer.quantized_weight
            if isinstance(weight, QuantizedWeight) and weight.config.bits is not None and not weight.fixed:
                weight.fix(weight.codes(layer.weight))


def plain_network(target: Any, method: str) -> nn.Module:
    """The one denoiser of a pipeline, or a module, without modiff on it. Raises: ConfigError or StateError."""
    modules = networks_of(target)
    if len(modules) != 1:
        raise ConfigError(
            f"{method}: expected a pipeline with one denoiser, got {', '.join(modules)}. Calibration data belong to "
            "one network. Quantize each alone: quantize(pipe.transformer, config, run=...)."
        )
    model = next(iter(modules.values()))
    if attachment_of(model) is not None:
        raise StateError(
            f"{method}: expected a full-precision model, got a {type(model).__name__} with modulated layers. It is "
            "calibrated against full precision. Call modiff.remove first."
        )
    return model
