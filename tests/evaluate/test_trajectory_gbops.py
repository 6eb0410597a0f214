"""Bit-operations of a trajectory, counted by hand."""

from __future__ import annotations

import dataclasses

import pytest

from modiff import presets
from modiff.config import LayerConfig, ModulationConfig
from modiff.evaluate.cost import LayerCost, ModelCost
from modiff.evaluate.trajectory_gbops import trajectory_gbops
from modiff.model.report import Entry, Report

MACS = 10**9
STEPS = 10


def layer(name: str) -> LayerCost:
    return LayerCost(name=name, kind="conv", macs=MACS, calls=1, weight_elements=1, input_elements=1, output_elements=1)


def count(config: LayerConfig) -> float:
    """GBOPs of ten steps of one taken layer of 1 GMAC."""
    return trajectory_gbops(ModelCost((layer("a"),)), Report((Entry("a", "Conv2d", 1, config, ""),)), STEPS)


def with_modulation(config: LayerConfig, **settings: object) -> LayerConfig:
    return dataclasses.replace(config, modulation=ModulationConfig(**settings))  # type: ignore[arg-type]


W8A4 = presets.modulated(8, 4).layer


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (presets.plain(8, 4).layer, 10 * 8 * 4),
        (W8A4, 8 * 32 + 9 * 8 * 4),
        (presets.modulated(None, 4).layer, 32 * 32 + 9 * 32 * 4),
        (presets.modulated(8, None).layer, 10 * 8 * 32),
        (presets.modulated(8, 0).layer, 8 * 32),
        (with_modulation(W8A4, first_step="coded", rounds=3), 8 * 12 + 9 * 8 * 4),
        (with_modulation(W8A4, reanchor_every=4), 3 * 8 * 32 + 7 * 8 * 4),
    ],
)
def test_a_layer_counts_each_step_at_the_bits_it_runs_with(config: LayerConfig, expected: int) -> None:
    assert count(config) == expected


def test_layers_that_were_left_and_attention_count_in_full_precision() -> None:
    cost = ModelCost((layer("a"), layer("left"), layer("attention")))
    report = Report((Entry("a", "Conv2d", 1, presets.plain(8, 8).layer, ""), Entry("left", "Conv2d", 1, None, "tiny")))
    assert trajectory_gbops(cost, report, 2) == 2 * (8 * 8 + 2 * 32 * 32)


def test_without_a_report_everything_is_full_precision() -> None:
    assert trajectory_gbops(ModelCost((layer("a"), layer("b"))), None, 3) == 3 * 2 * 32 * 32
