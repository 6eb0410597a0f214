"""Which steps of which trajectories become calibration data: samplers of time steps."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from modiff.config import JsonConfig, check
from modiff.errors import ConfigError


class StepSampler(Protocol):
    """Chooses the steps that are kept; `modiff.collect` asks once, before the first trajectory."""

    def draw(self, steps: int, samples: int, generator: torch.Generator) -> Tensor:
        """Which evaluations of which samples are kept: booleans (steps, samples); step 0 is the noisiest."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Its settings as plain JSON values; a set is only continued with the same."""
        ...


@dataclass(frozen=True, kw_only=True)
class EveryStep(JsonConfig):
    """All evaluations of all samples."""

    def draw(self, steps: int, samples: int, generator: torch.Generator) -> Tensor:
        """Booleans (steps, samples), all True."""
        return torch.ones(steps, samples, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class UniformGroups(JsonConfig):
    """`groups` equally spaced steps, the same for all samples (Q-Diffusion, section 4.1: every c = T / groups steps).

    Kept are the steps floor(i T / groups), i = 0, ..., groups - 1: groups x samples evaluations.
    """

    groups: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check("UniformGroups.groups", self.groups, self.groups >= 1, "1 or more groups", "Q-Diffusion takes 20.")

    def draw(self, steps: int, samples: int, generator: torch.Generator) -> Tensor:
        """Booleans (steps, samples). Raises: ConfigError for more groups than steps."""
        if self.groups > steps:
            raise ConfigError(
                f"UniformGroups.groups: expected at most {steps} groups of {steps} steps, got {self.groups}. A group "
                f"has at least one step. Use groups={steps} or more steps."
            )
        kept = torch.zeros(steps, samples, dtype=torch.bool)
        kept[[i * steps // self.groups for i in range(self.groups)]] = True
        return kept


@dataclass(frozen=True, kw_only=True)
class NormalSteps(JsonConfig):
    """One step for each sample, near a normal distribution (NDTC; PTQ4DM, section 3.3).

    t_i = clamp(floor(mean T + T / 2 z_i), 0, T - 1), z_i ~ N(0, 1), for T steps counted from the clean end: step
    T - 1 - t_i. T / 2 is a deviation: as a variance, as the paper writes it, nearly all samples would come from a few
    steps. mean: under 0.5 prefers states near the image; the paper's script takes 0.4.
    """

    mean: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check("NormalSteps.mean", self.mean, 0 <= self.mean <= 1, "a share of the steps in [0, 1]", "PTQ4DM takes 0.4.")

    def draw(self, steps: int, samples: int, generator: torch.Generator) -> Tensor:
        """Booleans (steps, samples) with one True for each sample."""
        noise = torch.randn(samples, generator=generator, dtype=torch.float64)
        times = (self.mean * steps + steps / 2 * noise).floor().clamp(0, steps - 1).long()
        kept = torch.zeros(steps, samples, dtype=torch.bool)
        kept[steps - 1 - times, torch.arange(samples)] = True
        return kept


@dataclass(frozen=True, kw_only=True)
class CountedSteps(JsonConfig):
    """`counts[i]` samples give their state at step i, one state each; the first samples the noisiest."""

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        least = min(self.counts, default=-1)
        check("CountedSteps.counts", self.counts, least >= 0, "a number of samples for each step", "0 takes none.")

    def draw(self, steps: int, samples: int, generator: torch.Generator) -> Tensor:
        """Booleans (steps, samples) with one True for each sample. Raises: ConfigError for other numbers of either."""
        fits = (len(self.counts), sum(self.counts)) == (steps, samples)
        check("CountedSteps.counts", self.counts, fits, f"{steps} numbers that sum to {samples}",
              "Each sample gives the state of one step.")  # fmt: skip
        kept = torch.zeros(steps, samples, dtype=torch.bool)
        kept[torch.arange(steps).repeat_interleave(torch.tensor(self.counts)), torch.arange(samples)] = True
        return kept
