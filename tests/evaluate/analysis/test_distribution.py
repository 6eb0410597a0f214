"""Histograms of activation and temporal difference: every value is counted once, in the right bin."""

from itertools import pairwise

import torch
from torch import nn

from modiff.config import LayerConfig
from modiff.evaluate.analysis.distribution import HISTOGRAM_BINS, Distribution
from modiff.evaluate.analysis.watch import watch
from tests.evaluate.analysis.networks import OneLayer, driven, only_layer
from tests.helpers import drifting


def by_hand(values: list[float]) -> list[int]:
    counts = [0] * HISTOGRAM_BINS
    for value in values:
        counts[min(HISTOGRAM_BINS - 1, max(0, int((value + 1) / 2 * HISTOGRAM_BINS)))] += 1
    return counts


def test_counts_equal_a_loop_over_all_values() -> None:
    inputs, network, distribution = (
        drifting(2, (3, 8), 5, 0.4, torch.float32),
        OneLayer(nn.Linear(8, 5)),
        Distribution(),
    )
    watch(network, driven(network, inputs), only_layer(LayerConfig()), [distribution])
    result = distribution.result()
    activation, difference = [], []
    for last, x in pairwise(inputs):
        activation += (x / x.abs().max()).flatten().tolist()
        difference += ((x - last) / x.abs().max()).flatten().tolist()
    assert result["activation"] == by_hand(activation)
    assert result["difference"] == by_hand(difference)
