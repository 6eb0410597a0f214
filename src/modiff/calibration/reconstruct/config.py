"""The settings of reconstruction, and what it reports of each unit."""

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from modiff.config import JsonConfig

Activations = Literal["full_precision", "quantized"]


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(JsonConfig):
    """What is learned on which units, and how long. The defaults are Q-Diffusion's for weights.

    learn: "weights" rounds each weight up or down (AdaRound); "activation_scales" learns the static scales of plain
        layers and of attention; "residual_scales" those of modulated layers (MoDiff).
    unit: "block" learns the layers of a block together; "layer" one at a time, as residual scales always are.
    blocks: fnmatch patterns on module names that are units, as well as the blocks that are known.
    exclude: fnmatch patterns on names of layers, and of attention's operands, that stay as they are; the others of
        their block are learned around them.
    activations: of the layers while weights are learned. "quantized" quantizes each by itself, as plain quantization
        does; inside the modulated loop activations are nearly exact, which "full_precision" stands for.
    iterations, batch, learning_rate, schedule: of Adam; a batch is this many rows of the calibration calls.
    p: of the loss, sum over channels of |output - target|^p, mean over the rest.
    regularizer: lambda of the penalty lambda * sum(1 - |2h - 1|^beta), see `core.adaround.beta_at`.
    held_out: share of the rows that are not learned on; they decide whether a unit keeps what it learned.
    checks: how often in all the held-out loss is measured; the best is kept, and decided weights stop a unit.
    patience: in the second half, stop after this many checks in a row that were no better than the best; 0 goes on.
    seed: of the rows drawn.
    """

    learn: Literal["weights", "activation_scales", "residual_scales"] = "weights"
    unit: Literal["block", "layer"] = "block"
    blocks: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    activations: Activations = "full_precision"
    iterations: int = 20_000
    batch: int = 32
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    p: float = 2.0
    regularizer: float = 0.01
    held_out: float = 0.125
    checks: int = 20
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        exact = self.learn == "activation_scales" and self.activations == "full_precision"
        for name, holds, expected, advice in (
            ("iterations", self.iterations >= 1, "1 or more", "0 learns nothing."),
            ("batch", self.batch >= 1, "1 or more", "0 learns nothing."),
            ("checks", self.checks >= 1, "1 or more", "0 learns nothing."),
            ("learning_rate", self.learning_rate > 0, "a positive number", "Try 0.001."),
            ("p", self.p >= 1, "1 or more", "2 for weights, 2.4 for activations."),
            ("regularizer", self.regularizer >= 0, "0 or more", "It pushes each weight up or down. Try 0.01."),
            ("held_out", 0 < self.held_out < 1, "a share in (0, 1)",
             "Without rows held out nobody knows whether a unit got better. Try 0.125."),
            ("unit", self.learn != "residual_scales" or self.unit == "layer", "'layer' for residual_scales",
             "Each layer is given its own two inputs. Use unit='layer'."),
            ("activations", not exact, "'quantized' for activation_scales",
             "Scales that quantize nothing learn nothing. Use ReconstructConfig.activation_scales()."),
            ("patience", self.patience >= 0, "0 or more checks", "0 never stops."),
        ):  # fmt: skip
            self.check(name, holds, expected, advice)

    def takes(self, name: str) -> bool:
        """Whether a layer may be learned, as far as `exclude` says."""
        return not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    @classmethod
    def weights(cls) -> Self:
        """AdaRound as Q-Diffusion runs it: 20,000 iterations of 32 rows a block, Adam at 0.001. For large models."""
        return cls()

    @classmethod
    def quick_weights(cls) -> Self:
        """AdaRound in minutes on two cores, for the embedded model and others of its size."""
        return cls(iterations=300, batch=16, learning_rate=0.1, checks=6, patience=0)

    @classmethod
    def activation_scales(cls) -> Self:
        """Static scales as Q-Diffusion learns them: 5,000 iterations of 32 rows, Adam from 4e-4 to 0, p = 2.4."""
        return cls(learn="activation_scales", activations="quantized", iterations=5000, learning_rate=4e-4,
                   schedule="cosine", p=2.4)  # fmt: skip

    @classmethod
    def quick_activation_scales(cls) -> Self:
        """The same in minutes on two cores: fewer iterations, at a rate that moves as far."""
        quick = {"iterations": 60, "batch": 16, "learning_rate": 0.02, "checks": 4, "patience": 0}
        return dataclasses.replace(cls.activation_scales(), **quick)

    def for_residuals(self) -> Self:
        """The same for static residual scales, layer by layer, as MoDiff learns them."""
        return dataclasses.replace(self, learn="residual_scales", unit="layer", activations="full_precision")


@dataclass(frozen=True)
class UnitReport:
    """One unit: its name and class, the layers learned, and the loss on rows that were held out.

    before: of rounding to nearest, or of the scales as they were. after: of what the unit has now; never above before.
    learned: whether it keeps what was learned. reason: why it stopped, or was left.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    before: float
    after: float
    learned: bool
    iterations: int
    reason: str

    @property
    def ratio(self) -> float:
        """after / before; 1 where there was nothing to gain."""
        return self.after / self.before if self.before > 0 else 1.0


@dataclass(frozen=True)
class ReconstructionReport:
    """Every unit, in the order of learning. Prints as a table."""

    units: tuple[UnitReport, ...]

    @property
    def learned(self) -> tuple[UnitReport, ...]:
        """The units that keep what they learned."""
        return tuple(u for u in self.units if u.learned)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON."""
        return {"units": [dataclasses.asdict(unit) for unit in self.units]}

    def __str__(self) -> str:
        width = max((len(u.name) for u in self.units), default=4)
        lines = [f"{len(self.learned)} of {len(self.units)} units learned (loss on held-out rows, before and after)"]
        for u in self.units:
            losses = f"{u.before:10.3e} -> {u.after:10.3e} {u.ratio:6.3f}  {'learned' if u.learned else 'kept   '}"
            lines.append(f"  {u.name:<{width}}  {losses}  {u.iterations:>6} iterations  {u.reason}".rstrip())
        return "\n".join(lines)
