"""Codes equal a quantizer written in plain Python numbers; scales, rounding, saturation and the floor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modiff import ConfigError
from modiff.core.affine import (
    SMALLEST_SCALE,
    QParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    qrange,
    quantize_tensor,
)
from tests.helpers import assert_float_error, assert_same_bits, assert_within
from tests.reference import quantizer as reference

GRANULARITIES = ("tensor", "sample", "token", "input_channel")


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(GRANULARITIES),
    symmetric=st.booleans(),
    clip=st.sampled_from([1.0, 0.8, 0.45]),
    shape_and_channel=st.sampled_from([((5,), -1), ((3, 4), -1), ((2, 3, 4), -1), ((2, 3, 4), 1), ((2, 3, 2, 2), 1)]),
    offset=st.sampled_from([0.0, 1.5, -40.0]),
)
def test_codes_and_values_equal_the_reference(seed, bits, granularity, symmetric, clip, shape_and_channel, offset):
    shape, channel = shape_and_channel
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    expected = reference.quantize(x, bits, granularity, symmetric=symmetric, clip=clip, channel_dim=channel)
    qparams = choose_qparams(x, bits, granularity, symmetric=symmetric, clip=clip, channel_dim=channel)
    codes = quantize_tensor(x, qparams, bits)
    assert_same_bits(codes, expected.codes.to(torch.int8))
    assert_within(qparams.scale.expand(shape), expected.step, 1e-15 * expected.step)
    assert_within(dequantize(codes, qparams), expected.value, 1e-13 * expected.step)
    assert_within(fake_quantize(x, qparams, bits), expected.value, 1e-13 * expected.step)
    assert (qparams.zero_point is None) == symmetric


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_coded_as_exactly_as_their_values_allow(granularity, dtype):
    x = torch.randn(4, 6, 16).to(dtype)
    qparams = choose_qparams(x, 6, granularity)
    assert qparams.scale.dtype == torch.float32
    expected = reference.quantize(x, 6, granularity)
    assert_same_bits(quantize_tensor(x, qparams, 6), expected.codes.to(torch.int8))
    value = fake_quantize(x, qparams, 6)
    assert value.dtype == dtype
    axes = {"tensor": (0, 1, 2), "sample": (1, 2), "token": (2,), "input_channel": (0, 1)}[granularity]
    step = x.abs().amax(axes, keepdim=True) / 31
    assert_float_error(value, torch.round(x.float() / expected.step.float()).to(dtype) * step, expected.value)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_codes_never_leave_the_range_of_their_bits_also_on_a_scale_far_too_fine(bits, symmetric, clip):
    seen = torch.randn(64)
    qparams = choose_qparams(seen, bits, "tensor", symmetric=symmetric, clip=clip)
    codes = quantize_tensor(100 * torch.linspace(-1, 1, 101), qparams, bits).tolist()
    assert min(codes) == -(2 ** (bits - 1))
    assert max(codes) == 2 ** (bits - 1) - 1


def test_ties_go_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize_tensor(x, QParams(torch.tensor(1.0), None), 4).tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_code_to_exact_zeros_with_a_positive_scale(symmetric):
    x = torch.zeros(2, 3)
    qparams = choose_qparams(x, 4, "sample", symmetric=symmetric)
    assert qparams.scale.flatten().tolist() == pytest.approx([SMALLEST_SCALE] * 2)
    assert torch.equal(dequantize(quantize_tensor(x, qparams, 4), qparams), x)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32])
def test_other_bit_widths_are_refused(bits):
    with pytest.raises(ConfigError, match=rf"bits: expected 2 to 8, got {bits}\."):
        qrange(bits)
