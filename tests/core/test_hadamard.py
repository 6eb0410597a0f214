"""The rotation against an explicit matrix built from Walsh's formula."""

from __future__ import annotations

import pytest
import torch

from modiff.core.hadamard import Segment, _hadamard, hadamard_block, rotate, segments_of
from tests.helpers import assert_float_error, assert_within
from tests.reference.hadamard import along, hadamard, largest_block, rotation

CASES = [
    ((64,), 1, 64),
    ((192,), 1, 64),
    ((96,), 1, 64),
    ((7,), 1, 64),
    ((24, 8), 1, 64),
    ((16,), 4, 64),
    ((32,), 1, 4),
]


@pytest.mark.parametrize(("runs", "groups", "limit"), CASES)
@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_rotating_is_the_explicit_matrix_on_that_axis(runs, groups, limit, dim):
    shape = [3, 5, 2]
    shape[dim] = sum(runs)
    x = torch.randn(shape, dtype=torch.float64)
    expected = along(x, rotation(runs, limit, groups), dim)
    assert_within(rotate(x, segments_of(runs, groups, limit), dim), expected, 1e-13)


@pytest.mark.parametrize(("runs", "groups", "limit"), CASES)
def test_rotating_twice_gives_the_input_back_and_keeps_lengths(runs, groups, limit):
    x = torch.randn(3, sum(runs), 4, dtype=torch.float64)
    segments = segments_of(runs, groups, limit)
    once = rotate(x, segments, 1)
    assert_within(rotate(once, segments, 1), x, 1e-13)
    assert_within(once.norm(dim=1), x.norm(dim=1), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, -1])
def test_the_float_error_is_that_of_a_plain_matrix_product(dtype, dim):
    x = torch.randn(8, 64, 64).to(dtype)
    matrix = hadamard(64)
    plain = (x.movedim(dim, -1) @ matrix.to(dtype)).movedim(-1, dim)
    actual = rotate(x, (Segment(64, 64),), dim)
    assert_float_error(actual, plain, along(x, matrix, dim))


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 12, 48, 64, 96, 128, 192, 320, 1152])
@pytest.mark.parametrize("largest", [2, 16, 64])
def test_the_block_is_the_largest_power_of_two_that_divides(channels, largest):
    assert hadamard_block(channels, largest) == largest_block(channels, largest)


def test_blocks_stay_inside_a_group_and_inside_a_segment():
    assert segments_of((32,), groups=4) == (Segment(32, 8),)
    assert segments_of((24, 64), 1, 16) == (Segment(24, 8), Segment(64, 16))


def test_a_rotation_that_was_first_made_in_inference_mode_takes_gradients_later():
    segments = segments_of((48,), 1, 16)
    _hadamard.cache_clear()
    with torch.inference_mode():
        rotate(torch.randn(2, 48), segments, 1)
    x = torch.randn(2, 48, requires_grad=True)
    rotate(x, segments, 1).sum().backward()
    assert x.grad is not None
