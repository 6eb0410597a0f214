"""What to generate: everything that a machine must be told, and nothing that lives in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from modiff.config import LayerConfig, ModiffConfig
from modiff.errors import ConfigError
from modiff.generate.conditions import Conditions


def check_counts(counts: dict[str, int | None], seed: int) -> None:
    """Raises: ConfigError if a count, by its option, is under 1 (None is left to us), or the seed out of range."""
    for option, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{option}: expected 1 or more, got {count}. There is nothing to do. Use {option} 1.")
    if seed < 0:
        raise ConfigError(f"--seed: expected 0 or more, got {seed}. Sample i uses seed + i. Use --seed 0.")
    if seed >= 2**62:
        raise ConfigError(f"--seed: expected less than 2**62, got {seed}. Generators count in 64 bits. Use --seed 0.")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Images 0 to num_images - 1 of a model; image i comes from the noise of seed + i. Picklable.

    model: "embedded", "cifar10", a diffusers folder, or a hub id.
    config: `ModiffConfig.to_dict()`; None for full precision. Scales must be dynamic.
    scheduler: a key of `generate.samplers.SAMPLERS`; None for the model's own.
    prompt, label: for pipelines that take them; the same for all images.
    prompts, labels: in their place several that the images take in turn, by their index.
    batch_size: images computed at a time. None: what the folder has, else 50, or num_images if that is less.
    shard_size: images in a file, a multiple of batch_size. None: what the folder has, else about 100.
    threads: of one worker. None: as torch has them; 1 on Ray.
    Raises: ConfigError for a number out of range, sizes that do not fit, or a config that is none or needs calibration.
    """

    model: str
    num_images: int
    steps: int = 50
    seed: int = 0
    config: dict[str, Any] | None = None
    scheduler: str | None = None
    prompt: str | None = None
    label: int | None = None
    prompts: tuple[str, ...] | None = None
    labels: tuple[int, ...] | None = None
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
        for option, one, several in (("prompt", self.prompt, self.prompts), ("label", self.label, self.labels)):
            if several is not None and (one is not None or not several):
                raise ConfigError(
                    f"--{option}s: expected one or more and no --{option} beside them, got {several!r:.60} and "
                    f"{one!r:.60}. An image is drawn of one. Leave --{option} out."
                )
        config = self.modiff_config
        if config is not None and any(map(_is_static, (config.layer, *(layer for _, layer in config.overrides)))):
            raise ConfigError(
                "config: expected dynamic scales, got static ones. They must be measured first, on inputs that this "
                "command does not know. Calibrate in Python, write with modiff.save(pipe, DIR), and generate from DIR."
            )

    @property
    def modiff_config(self) -> ModiffConfig | None:
        """The config as an object."""
        return None if self.config is None else ModiffConfig.from_dict(self.config)

    @property
    def conditions(self) -> Conditions:
        """What each image is drawn of."""
        prompts = self.prompts or (() if self.prompt is None else (self.prompt,))
        labels = self.labels or (() if self.label is None else (self.label,))
        return Conditions(prompts=prompts, labels=labels)

    def sizes(self) -> tuple[int, int]:
        """(batch_size, shard_size) of a new folder."""
        if self.shard_size is not None:
            most = min(_BATCH, self.num_images)
            fitting = max(size for size in range(1, most + 1) if self.shard_size % size == 0)
            return self.batch_size or fitting, self.shard_size
        batch = self.batch_size or min(_BATCH, self.num_images)
        return batch, batch * -(-_SHARD // batch)

    def loading(self) -> tuple[str, str, str | None, str | None]:
        """What makes the pipeline: (model, device, scheduler, config as JSON); a key of what is loaded."""
        config = None if self.config is None else json.dumps(self.config, sort_keys=True)
        return self.model, self.device, self.scheduler, config


_BATCH, _SHARD = 50, 100


def _is_static(layer: LayerConfig) -> bool:
    return not layer.activation.dynamic and layer.activation.bits not in (None, 0)
