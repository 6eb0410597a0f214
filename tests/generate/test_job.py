"""A job says no to what means nothing, before any model is open."""

from __future__ import annotations

from typing import Any

import pytest

from modiff.config import LayerConfig, ModiffConfig, QuantizerConfig
from modiff.errors import ConfigError
from modiff.generate.job import Job


def job(**changes: Any) -> Job:
    return Job(**{"model": "m", "num_images": 1000} | changes)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, (50, 100)),
        ({"num_images": 7}, (7, 105)),
        ({"batch_size": 30}, (30, 120)),
        ({"batch_size": 128}, (128, 128)),
        ({"shard_size": 1000}, (50, 1000)),
        ({"shard_size": 101}, (1, 101)),
        ({"shard_size": 64, "num_images": 9}, (8, 64)),
        ({"shard_size": 64, "batch_size": 4}, (4, 64)),
    ],
)
def test_sizes_of_a_new_folder(changes: dict[str, Any], sizes: tuple[int, int]) -> None:
    assert job(**changes).sizes() == sizes


STATIC = LayerConfig(activation=QuantizerConfig(dynamic=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "--num-images: expected 1 or more, got 0"),
        ({"threads": 0}, "--threads: expected 1 or more"),
        ({"seed": -1}, "--seed: expected 0 or more"),
        ({"seed": 2**62}, r"less than 2\*\*62"),
        ({"batch_size": 3, "shard_size": 100}, "expected a multiple of --batch-size 3, got 100"),
        ({"config": {"layers": {}}}, "expected a known field, got 'layers'"),
        ({"config": ModiffConfig(layer=STATIC).to_dict()}, "expected dynamic scales, got static ones"),
        ({"config": ModiffConfig(overrides=(("mid*", STATIC),)).to_dict()}, "expected dynamic scales"),
    ],
)
def test_a_job_that_means_nothing_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(**changes)


def test_a_config_without_activations_to_scale_is_no_static_one() -> None:
    layer = LayerConfig(activation=QuantizerConfig(bits=None, dynamic=False))
    assert job(config=ModiffConfig(layer=layer).to_dict()).config is not None
