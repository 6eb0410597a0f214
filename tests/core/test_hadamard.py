"""The rotation against an explicit matrix built from Walsh's formula."""

import pytest
import torch

from modiff.core.hadamard import RotatedRun, _hadamard, rotate, rotated_runs
from tests.helpers import assert_float_error, assert_within
from tests.reference.hadamard import along, hadamard, rotation


@pytest.mark.parametrize(
    ("runs", "groups", "limit"),
    [((192,), 1, 64), ((96,), 1, 64), ((7,), 1, 64), ((24, 8), 1, 64), ((16,), 4, 64), ((32,), 1, 4)],
)
@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_rotating_is_the_explicit_matrix_on_that_axis(runs, groups, limit, dim):
    shape = [3, 5, 2]
    shape[dim] = sum(runs)
    x = torch.randn(shape, dtype=torch.float64)
    expected = along(x, rotation(runs, limit, groups), dim)
    assert_within(rotate(x, rotated_runs(runs, groups, limit), dim), expected, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, -1])
def test_the_float_error_is_that_of_a_plain_matrix_product(dtype, dim):
    x = torch.randn(8, 64, 64).to(dtype)
    matrix = hadamard(64)
    plain = (x.movedim(dim, -1) @ matrix.to(dtype)).movedim(-1, dim)
    actual = rotate(x, (RotatedRun(64, 64),), dim)
    assert_float_error(actual, plain, along(x, matrix, dim))


def test_a_rotation_that_was_first_made_in_inference_mode_takes_gradients_later():
    runs = rotated_runs((48,), 1, 16)
    _hadamard.cache_clear()
    with torch.inference_mode():
        rotate(torch.randn(2, 48), runs, 1)
    x = torch.randn(2, 48, requires_grad=True)
    rotate(x, runs, 1).sum().backward()
    assert x.grad is not None
