"""What to generate: everything that a machine must be told, and nothing that lives in memory."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modiff.config import ModiffConfig, check
from modiff.files import reading

BATCH_SIZE, SHARD_SIZE = 50, 100
MOST_LABELS = 100_000
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Prompts and class labels that the images take in turn: image i has number i modulo their number. Empty: none."""

    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"prompts": list(self.prompts) or None, "labels": list(self.labels) or None}

    def of(self, indices: Sequence[int]) -> dict[str, Any]:
        """The prompt and the label of each index; None where there are none."""
        turns = {"prompt": self.prompts, "label": self.labels}
        return {name: [values[i % len(values)] for i in indices] if values else None for name, values in turns.items()}


def parse_labels(text: str) -> tuple[int, ...]:
    """Labels as they are typed: numbers and ranges between commas, both ends in.

    Raises: ConfigError for anything else, a range that falls, or more than 100,000 labels.

    >>> parse_labels("0-3,7")
    (0, 1, 2, 3, 7)
    """
    labels: list[int] = []
    for typed in text.split(","):
        match = _RANGE.fullmatch(typed.strip())
        first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        fits = first <= last and len(labels) + last - first < MOST_LABELS
        check("labels", text[:40], fits, "numbers and ranges between commas", "Use labels=0-9 or labels=3,5,8.")
        labels += range(first, last + 1)
    return tuple(labels)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts in a text file, one a line; lines of nothing but spaces do not count.

    Raises: FormatError if it cannot be read as UTF-8, or holds no prompt.
    """
    with reading(path, "a text file with a prompt in each line", "Write the prompts into it, in UTF-8."):
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = tuple(line.strip() for line in lines if line.strip())
        if not prompts:
            raise ValueError("none")
    return prompts


def check_counts(counts: dict[str, int | None], seed: int) -> None:
    """Raises: ConfigError if a count, by its option, is under 1 (None is left to us), or the seed out of range."""
    for option, count in counts.items():
        check(option, count, count is None or count >= 1, "1 or more", f"There is nothing to do. Use {option}=1.")
    check("seed", seed, 0 <= seed < 2**62, "0 or more and less than 2**62", "Image i uses seed + i. Use seed=0.")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Images 0 to num_images - 1 of a model; image i comes from the noise of seed + i. Picklable.

    model: "embedded", "cifar10", a diffusers folder, or a hub id.
    config: with dynamic scales; None for full precision. scheduler: of `samplers.SAMPLERS`; None for the model's own.
    batch_size: images computed at a time. None: what the folder has; in a new one 50, or num_images if that is less.
    shard_size: images in a file, a multiple of batch_size. None: what the folder has; in a new one about 100.
    threads: of one worker. None: as torch has them; 1 on Ray.
    Raises: ConfigError for a number out of range, sizes that do not fit, or a config that needs calibration.
    """

    model: str
    num_images: int
    steps: int = 50
    seed: int = 0
    config: ModiffConfig | None = None
    scheduler: str | None = None
    conditions: Conditions = Conditions()
    device: str = "cpu"
    batch_size: int | None = None
    shard_size: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        counts = {"num_images": self.num_images, "steps": self.steps, "batch_size": self.batch_size}
        check_counts(counts | {"shard_size": self.shard_size, "threads": self.threads}, self.seed)
        fits = self.batch_size is None or self.shard_size is None or self.shard_size % self.batch_size == 0
        why = "A shard is made of whole batches. Leave `shard_size` out."
        check("shard_size", self.shard_size, fits, f"a multiple of batch_size={self.batch_size}", why)
        layers = () if self.config is None else (self.config.layer, *dict(self.config.overrides).values())
        dynamic = all(layer.activation.dynamic or layer.activation.bits in (None, 0) for layer in layers)
        why = "They must be measured. Calibrate in Python, write with modiff.save(pipe, DIR), and generate from DIR."
        check("config", "static ones", dynamic, "dynamic scales", why)

    def sizes(self) -> tuple[int, int]:
        """(batch_size, shard_size) of a new folder."""
        most = min(BATCH_SIZE, self.num_images)
        batch = self.batch_size or max(size for size in range(1, most + 1) if (self.shard_size or size) % size == 0)
        return batch, self.shard_size or batch * -(-SHARD_SIZE // batch)
