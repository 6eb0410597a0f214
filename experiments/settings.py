"""How much of the study is run, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modiff.config import JsonConfig, check
from modiff.errors import ConfigError

Depth = Literal["quick", "full"]
FEWEST_STEPS = 10
IMAGES: dict[Depth, int] = {"quick": 8, "full": 32}


@dataclass(frozen=True, kw_only=True)
class StudySettings(JsonConfig):
    """What every experiment shares.

    depth: "quick" runs coarse grids, "full" fine ones. steps: of DDIM, where an experiment has no steps of its own.
    num_images: image i comes from the noise of seed + i, in batches of `batch_size`.
    experiments: names, see `experiment_names`; empty is all of them. model: what the commands in the report name.
    """

    depth: Depth = "quick"
    steps: int = 50
    num_images: int = IMAGES["quick"]
    seed: int = 0
    batch_size: int = 8
    experiments: tuple[str, ...] = ()
    model: str = "embedded"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            "StudySettings.steps",
            self.steps,
            self.steps >= FEWEST_STEPS,
            f"{FEWEST_STEPS} or more steps",
            "Rows with a tenth of them are run as well. Use 50.",
        )
        check(
            "StudySettings.num_images",
            self.num_images,
            self.num_images >= 1,
            "1 or more images",
            "There is nothing to compare. Use 8.",
        )
        check("StudySettings.batch_size", self.batch_size, self.batch_size >= 1, "1 or more images", "Use 8.")

    @property
    def full(self) -> bool:
        """Whether the grids are fine."""
        return self.depth == "full"


def settings_for(
    depth: str,
    *,
    num_images: int | None = None,
    steps: int = 50,
    seed: int = 0,
    experiments: tuple[str, ...] = (),
    model: str = "embedded",
) -> StudySettings:
    """The settings of a depth, with its own number of images unless one is given.

    Raises: ConfigError for an unknown depth.
    """
    if depth not in IMAGES:
        raise ConfigError(f"study: expected one of {', '.join(IMAGES)}, got {depth!r}. Use quick for a first look.")
    images = IMAGES[depth] if num_images is None else num_images
    return StudySettings(depth=depth, num_images=images, steps=steps, seed=seed, experiments=experiments, model=model)
