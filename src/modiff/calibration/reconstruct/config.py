"""The settings of reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Self

from modiff.config import JsonConfig, check

Learned = Literal["weights", "activation_steps", "residual_steps"]
Unit = Literal["block", "layer"]
Activations = Literal["full_precision", "quantized"]
Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(JsonConfig):
    """What is learned on which units, and how long. The defaults are Q-Diffusion's for weights.

    learn: "weights" rounds each weight up or down (AdaRound); "activation_steps" learns the static scales of plain
        layers and of attention; "residual_steps" those of modulated layers (MoDiff).
    unit: "block" learns the layers of a block together; "layer" one at a time, as residual steps always are.
    blocks: fnmatch patterns on module names that are units, beside the blocks that are known.
    exclude: fnmatch patterns on names of layers, and of attention's operands, that stay as they are; the others of
        their block are learned around them.
    activations: of the layers while weights are learned. "quantized" codes each from nothing, as plain quantization
        does; inside the modulated loop activations are nearly exact, which "full_precision" stands for.
    iterations, batch, learning_rate, schedule: of Adam; a batch is so many rows of the calibration calls.
    p: of the loss, sum over channels of |output - target|^p, mean over the rest.
    regularizer, beta_start, beta_end, warmup: lambda * sum(1 - |2h - 1|^beta) with beta falling from start to end, and
        none of it in the first share `warmup` of the iterations.
    held_out: share of the rows that are not learned on; they decide whether a unit keeps what it learned.
    checks: how often in all the held-out loss is measured while learning; the best that was seen is kept. A unit stops
        at the check that finds every weight decided.
    patience: in the second half, stop after so many checks in a row that were no better than the best; 0 goes on.
    seed: of the rows drawn.
    """

    learn: Learned = "weights"
    unit: Unit = "block"
    blocks: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    activations: Activations = "full_precision"
    iterations: int = 20_000
    batch: int = 32
    learning_rate: float = 1e-3
    schedule: Schedule = "constant"
    p: float = 2.0
    regularizer: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2
    held_out: float = 0.125
    checks: int = 20
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "batch", "checks"):
            value = getattr(self, name)
            check(f"ReconstructConfig.{name}", value, value >= 1, "1 or more", "Less learns nothing.")
        check("ReconstructConfig.learning_rate", self.learning_rate, self.learning_rate > 0, "a positive number",
              "Adam moves by about this much. Try 0.001.")  # fmt: skip
        check("ReconstructConfig.p", self.p, self.p >= 1, "1 or more", "2 for weights, 2.4 for activations.")
        check("ReconstructConfig.regularizer", self.regularizer, self.regularizer >= 0, "0 or more",
              "It pushes each weight up or down. Try 0.01.")  # fmt: skip
        check("ReconstructConfig.beta_end", self.beta_end, 1 <= self.beta_end <= self.beta_start,
              f"1 to beta_start={self.beta_start}", "beta falls. Use 20 and 2.")  # fmt: skip
        check("ReconstructConfig.warmup", self.warmup, 0 <= self.warmup <= 1, "a share in [0, 1]", "Try 0.2.")
        check("ReconstructConfig.held_out", self.held_out, 0 < self.held_out < 1, "a share in (0, 1)",
              "Without rows held out nobody knows whether a unit got better. Try 0.125.")  # fmt: skip
        check("ReconstructConfig.unit", self.unit, self.learn != "residual_steps" or self.unit == "layer",
              "'layer' for residual_steps", "Each layer is given its own two inputs. Use unit='layer'.")  # fmt: skip
        exact = self.learn == "activation_steps" and self.activations == "full_precision"
        check("ReconstructConfig.activations", self.activations, not exact, "'quantized' for activation_steps",
              "Scales that code nothing learn nothing. Use ReconstructConfig.activation_steps().")  # fmt: skip
        check("ReconstructConfig.patience", self.patience, self.patience >= 0, "0 or more checks", "0 never stops.")

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
    def activation_steps(cls) -> Self:
        """Static scales as Q-Diffusion learns them: 5,000 iterations of 32 rows, Adam from 4e-4 to 0, p = 2.4."""
        return cls(learn="activation_steps", activations="quantized", iterations=5000, learning_rate=4e-4,
                   schedule="cosine", p=2.4)  # fmt: skip

    @classmethod
    def residual_steps(cls) -> Self:
        """Static residual scales as MoDiff learns them, layer by layer: as `activation_steps`."""
        return cls(learn="residual_steps", unit="layer", iterations=5000,
                   learning_rate=4e-4, schedule="cosine", p=2.4)  # fmt: skip
