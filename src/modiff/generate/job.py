"""What to generate: everything that a machine must be told, and nothing that lives in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modiff.config import ModiffConfig
from modiff.errors import ConfigError
from modiff.generate.conditions import Conditions

BATCH_SIZE, SHARD_SIZE = 50, 100


def check_counts(counts: dict[str, int | None], seed: int) -> None:
    """Raises: ConfigError if a count, by its option, is under 1 (None is left to us), or the seed out of range."""
    for option, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{option}: expected 1 or more, got {count}. There is nothing to do. Use {option} 1.")
    if not 0 <= seed < 2**62:
        raise ConfigError(
            f"--seed: expected 0 or more and less than 2**62, got {seed}. Image i uses seed + i. Use --seed 0."
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """Images 0 to num_images - 1 of a model; image i comes from the noise of seed + i. Picklable.

    model: "embedded", "cifar10", a diffusers folder, or a hub id.
    config: `ModiffConfig.to_dict()`; None for full precision. Scales must be dynamic.
    scheduler: a key of `generate.samplers.SAMPLERS`; None for the model's own.
    batch_size: images computed at a time. None: what the folder has; in a new one 50, or num_images if that is less.
    shard_size: images in a file, a multiple of batch_size. None: what the folder has; in a new one about 100.
    threads: of one worker. None: as torch has them; 1 on Ray.
    Raises: ConfigError for a number out of range, sizes that do not fit, or a config that needs calibration.
    """

    model: str
    num_images: int
    steps: int = 50
    seed: int = 0
    config: dict[str, Any] | None = None
    scheduler: str | None = None
    conditions: Conditions = field(default_factory=Conditions)
    device: str = "cpu"
    batch_size: int | None = None
    shard_size: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        counts = {"--num-images": self.num_images, "--steps": self.steps, "--batch-size": self.batch_size}
        check_counts(counts | {"--shard-size": self.shard_size, "--threads": self.threads}, self.seed)
        if self.batch_size is not None and self.shard_size is not None and self.shard_size % self.batch_size:
            raise ConfigError(
                f"--shard-size: expected a multiple of --batch-size {self.batch_size}, got {self.shard_size}. A shard "
                "is made of whole batches. Leave --shard-size out."
            )
        config = ModiffConfig() if self.config is None else ModiffConfig.from_dict(self.config)
        activations = [layer.activation for layer in (config.layer, *(layer for _, layer in config.overrides))]
        if self.config is not None and any(not a.dynamic and a.bits not in (None, 0) for a in activations):
            raise ConfigError(
                "config: expected dynamic scales, got static ones. They must be measured first, on inputs that this "
                "command does not know. Calibrate in Python, write with modiff.save(pipe, DIR), and generate from DIR."
            )

    def sizes(self) -> tuple[int, int]:
        """(batch_size, shard_size) of a new folder."""
        most = min(BATCH_SIZE, self.num_images)
        if self.shard_size is not None:
            fitting = max(size for size in range(1, most + 1) if self.shard_size % size == 0)
            return self.batch_size or fitting, self.shard_size
        batch = self.batch_size or most
        return batch, batch * -(-SHARD_SIZE // batch)
