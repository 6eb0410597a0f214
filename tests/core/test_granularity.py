"""Granularities by name: their scales, which of them integers can run, and names that nobody knows."""

import pytest
import torch

from modiff import ConfigError
from modiff.core.granularity import Granularity, granularity_named, resolve


@pytest.mark.parametrize(
    ("name", "channel_dim", "shape"),
    [
        ("tensor", 1, (1, 1, 1, 1)),
        ("sample", 1, (2, 1, 1, 1)),
        ("token", 1, (2, 1, 4, 5)),
        ("token", -1, (2, 3, 4, 1)),
        ("input_channel", 1, (1, 3, 1, 1)),
    ],
)
def test_scales_are_1_along_the_axes_that_share_one(name, channel_dim, shape):
    assert granularity_named(name).reduce(torch.ones(2, 3, 4, 5), channel_dim, torch.amax).shape == shape


@pytest.mark.parametrize(
    ("name", "kernel", "reason"),
    [
        ("tensor", (3, 3), ""),
        ("sample", (3, 3), ""),
        ("token", (), ""),
        ("token", (1, 1), ""),
        ("token", (1, 3), "a scale for each pixel"),
        ("input_channel", (), "a scale along the summed axis"),
    ],
)
def test_scales_along_what_is_summed_have_no_integer_sums(name, kernel, reason):
    assert granularity_named(name).unsupported(kernel).startswith(reason)
    assert bool(granularity_named(name).unsupported(kernel)) is bool(reason)


def test_what_integer_kernels_do_not_know_they_refuse():
    assert Granularity().unsupported() == "no kernel knows its granularity"


def test_auto_is_a_scale_per_token_for_linear_layers_and_per_sample_for_convolutions():
    assert (resolve("auto", -1), resolve("auto", 1), resolve("tensor", 1)) == ("token", "sample", "tensor")


@pytest.mark.parametrize("name", ["auto", "channel"])
def test_an_unresolved_granularity_is_refused(name):
    with pytest.raises(ConfigError, match=f"granularity: expected one of tensor, .* got '{name}'"):
        granularity_named(name)
