"""Histograms of activation and temporal difference: every value is counted once, in the right bin."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from modiff import presets
from modiff.config import LayerConfig
from modiff.evaluate.analysis.distribution import BINS, Distribution, DistributionResult, histogram
from modiff.evaluate.analysis.watch import watch
from modiff.hosts.diffusers.runs import unconditional_run
from tests.evaluate.analysis.networks import OneLayer, driven, only_layer
from tests.helpers import drifting
from tests.hosts.tiny import HOSTS


def counted(inputs: list[Tensor]) -> DistributionResult:
    network = OneLayer(nn.Linear(8, 5))
    distribution = Distribution()
    watch(network, driven(network, inputs), only_layer(LayerConfig()), [distribution])
    return distribution.result()


def by_hand(values: list[float]) -> list[int]:
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, max(0, int((value + 1) / 2 * BINS)))] += 1
    return counts


def test_counts_equal_a_loop_over_all_values() -> None:
    inputs = drifting(2, (3, 8), 5, 0.4, torch.float32)
    pooled = counted(inputs)["pooled"]
    activation, difference = [], []
    for last, x in pairwise(inputs):
        activation += (x / x.abs().max()).flatten().tolist()
        difference += ((x - last) / x.abs().max()).flatten().tolist()
    assert pooled["activation"] == by_hand(activation)
    assert pooled["difference"] == by_hand(difference)


def test_counts_of_a_pipeline_sum_up_to_all_values_of_all_steps_but_the_first() -> None:
    pipe = HOSTS["ddim"].build()
    pipe.set_progress_bar_config(disable=True)
    distribution, sizes = Distribution(), []

    class Sizes:
        def see(self, visit: object) -> None:
            sizes.append((visit.step, visit.input.numel()))

    watch(pipe, unconditional_run(pipe, 4, 2, 0), presets.w8a4(), [distribution, Sizes()])
    result = distribution.result()
    expected = sum(size for step, size in sizes if step > 0)
    assert sum(result["pooled"]["activation"]) == sum(result["pooled"]["difference"]) == expected
    assert len(result["layers"]) == 3
    assert all(0 < sum(layer["activation"]) < expected for layer in result["layers"])
    assert len({layer["name"] for layer in result["layers"]}) == 3


def test_a_still_input_has_all_differences_in_the_middle_bin() -> None:
    pooled = counted([torch.linspace(-2, 2, 16).reshape(2, 8)] * 3)["pooled"]
    assert pooled["difference"][BINS // 2] == sum(pooled["difference"]) == 32
    assert pooled["activation"][0] == pooled["activation"][-1] == 2


def test_the_edges_span_minus_one_to_one_around_a_bin_at_zero() -> None:
    edges = counted(drifting(2, (3, 8), 2, 0.4, torch.float32))["edges"]
    assert (edges[0], edges[-1], len(edges)) == (-1, 1, BINS + 1)
    assert edges[BINS // 2] < 0 < edges[BINS // 2 + 1]


def test_values_outside_are_counted_at_the_ends() -> None:
    counts = histogram(torch.tensor([-7.0, -1.0, 1.0, 2.5, 0.0]))
    assert (int(counts[0]), int(counts[-1]), int(counts[BINS // 2]), int(counts.sum())) == (2, 2, 1, 5)


def test_an_input_of_zeros_is_counted_at_zero() -> None:
    pooled = counted([torch.zeros(2, 8)] * 2)["pooled"]
    assert pooled["activation"][BINS // 2] == pooled["difference"][BINS // 2] == 16


@pytest.mark.parametrize("panels", [1, 2, 3])
def test_one_layer_gives_one_panel(panels: int) -> None:
    network = OneLayer(nn.Linear(8, 5))
    distribution = Distribution()
    run = driven(network, drifting(2, (3, 8), 3, 0.4, torch.float32))
    watch(network, run, only_layer(LayerConfig()), [distribution])
    assert [layer["name"] for layer in distribution.result(panels)["layers"]] == ["layer"]
