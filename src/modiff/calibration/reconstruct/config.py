"""The settings of reconstruction, and what it reports of each unit."""

import dataclasses
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from modiff.config import JsonConfig

Activations = Literal["full_precision", "quantized"]


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(JsonConfig):
    """How much each calibration sample counts while weights are learned: see `reconstruct.alignment`.

    samples: at most this many weights; neighbours along the trajectory share one. groups: of steps whose gradients are
    to agree. validation: share of all rows, drawn from those held out, the same number of each group.
    temperature: of the softmax. inner_rate: share of the loss that the inner step takes off, to first order; it is
        at most a tenth as long as the rounding error. Agreement goes with the square of this rate: at large ones
        weights that raise the loss, and with it all gradients, win.
    outer_steps, outer_rate: of Adam on the logits; rate 0 keeps all weights at 1.
    """

    samples: int = 32
    groups: int = 5
    validation: float = 0.05
    temperature: float = 1.0
    inner_rate: float = 0.01
    outer_steps: int = 10
    outer_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, holds, expected in (
            ("samples", self.samples >= 2, "2 or more"), ("groups", self.groups >= 2, "2 or more"),
            ("validation", 0 < self.validation < 1, "a share in (0, 1)"),
            ("temperature", self.temperature > 0, "more than 0"), ("inner_rate", self.inner_rate > 0, "more than 0"),
            ("outer_steps", self.outer_steps >= 1, "1 or more"), ("outer_rate", self.outer_rate >= 0, "0 or more"),
        ):  # fmt: skip
            self.check(name, holds, expected, "Leave it out for the default.")


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(JsonConfig):
    """What is learned on which units, and how long. The defaults are Q-Diffusion's for weights.

    learn: "weights" rounds each weight up or down (AdaRound); "activation_scales" learns the static scales of plain
        layers and of attention; "weights_and_scales" both together; "residual_scales" those of modulated layers.
    unit: "block" learns the layers of a block together; "layer" one at a time, as residual scales always are.
    blocks: fnmatch patterns on module names that are units, as well as the blocks that are known.
    exclude: fnmatch patterns on names of layers, and of attention's operands, that stay as they are; the others of
        their block are learned around them.
    activations: of the layers while weights are learned. "quantized" quantizes each by itself, as plain quantization
        does; inside the modulated loop activations are nearly exact, which "full_precision" stands for.
    iterations, batch, learning_rate, schedule: of Adam; a batch is this many rows of the calibration calls.
    scale_rate: of Adam on scales that are learned together with weights, instead of learning_rate.
    layer_weight: w of the loss + w * sum of the losses of the block's layers but the last (EDA-DM).
    qdrop: probability with which a value of an activation stays as it is in an iteration (QDrop).
    alignment: learns how much each sample counts while weights are learned; None: all the same.
    p: of the loss, sum over channels of |output - target|^p, mean over the rest.
    regularizer: lambda of the penalty lambda * sum(1 - |2h - 1|^beta), see `core.adaround.beta_at`.
    held_out: share of the rows that are not learned on; they decide whether a unit keeps what it learned.
    checks: how often in all the held-out loss is measured; the best is kept, and decided weights stop a unit.
    patience: in the second half, stop after this many checks in a row that were no better than the best; 0 goes on.
    seed: of the rows drawn.
    """

    learn: Literal["weights", "activation_scales", "weights_and_scales", "residual_scales"] = "weights"
    unit: Literal["block", "layer"] = "block"
    blocks: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    activations: Activations = "full_precision"
    iterations: int = 20_000
    batch: int = 32
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    scale_rate: float = 1e-3
    layer_weight: float = 0.0
    qdrop: float = 0.0
    alignment: AlignmentConfig | None = None
    p: float = 2.0
    regularizer: float = 0.01
    held_out: float = 0.125
    checks: int = 20
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        exact = self.activations == "full_precision" and self.learn in ("activation_scales", "weights_and_scales")
        quantized = self.activations == "quantized"
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
            ("activations", not exact, f"'quantized' for {self.learn}",
             "Scales that quantize nothing learn nothing. Use ReconstructConfig.activation_scales()."),
            ("scale_rate", self.scale_rate > 0, "a positive number", "Try 0.001."),
            ("layer_weight", self.layer_weight >= 0, "0 or more", "EDA-DM takes 0.8."),
            ("layer_weight", self.layer_weight == 0 or (self.learns_rounding and self.unit == "block"),
             "0 without rounding to learn in blocks", "A layer alone has no layers inside."),
            ("qdrop", self.qdrop == 0 or (0 < self.qdrop < 1 and self.activations == "quantized"),
             "0, or a probability in (0, 1) with activations='quantized'", "Floats have nothing to drop."),
            ("alignment", self.alignment is None or (self.learn == "weights" and not quantized),
             "None unless weights alone are learned, with activations='full_precision'",
             "Its gradients are those of weights."),
            ("patience", self.patience >= 0, "0 or more checks", "0 never stops."),
        ):  # fmt: skip
            self.check(name, holds, expected, advice)

    @property
    def learns_rounding(self) -> bool:
        """Whether weights are rounded up or down."""
        return self.learn in ("weights", "weights_and_scales")

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
    figures: of what is kept. "undecided": share of weights with h in (.05, .95) before h is cut at one half; "soft":
        the loss then, so that after / soft is the jump at hardening. With alignment, of the inner step with uniform and
        with learned weights: "validation_uniform", "validation_learned", the loss over that before the step;
        "cosine_uniform", "cosine_learned", the mean cosine between the gradients of two groups of steps.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    before: float
    after: float
    learned: bool
    iterations: int
    reason: str
    figures: dict[str, float] = field(default_factory=dict)

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
            figures = "".join(f", {name} {value:.4g}" for name, value in u.figures.items())
            lines.append(f"  {u.name:<{width}}  {losses}  {u.iterations:>6} iterations  {u.reason}{figures}".rstrip())
        return "\n".join(lines)
