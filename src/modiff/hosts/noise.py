"""The noise of a sample, by its index: the same image whatever the batch it is generated in."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def noise_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One generator for each sample, seeded with seed + index; to be given to a pipeline as `generator=`."""
    return [torch.Generator("cpu").manual_seed(seed + index) for index in indices]
