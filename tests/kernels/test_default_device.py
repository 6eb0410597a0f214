"""Memory that kernels make for themselves lies beside their inputs, whatever torch takes by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from modiff.kernels import fixed_point, kernel, onednn
from modiff.kernels.encode import encode_eagerly, encode_residual, layout_of
from modiff.kernels.input_fusion import InputFusion
from modiff.kernels.problem import Problem
from tests.helpers import assert_same_bits


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Tensors made without a device have no memory, and floats half of the bits."""
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def some(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("rows", [(4, 6), (2, 3, 20_000)])  # of one block, and of several
@pytest.mark.parametrize("granularity", ["tensor", "sample"])
def test_the_input_side_computes_the_same(elsewhere, rows, granularity):
    x, state = some(*rows), torch.zeros(rows, dtype=torch.float32, device="cpu")
    codes, scale = encode_residual(x, state, None, 8, granularity=granularity)
    with torch.device("cpu"):
        again = torch.zeros(rows, dtype=torch.float32)
        expected = encode_eagerly(x, (again, None, None), None, layout_of(x.shape, x.stride(), 8, 1.0, granularity, -1))
    assert_same_bits(codes, expected[0])
    assert_same_bits(scale, expected[1])
    assert_same_bits(state, again)


@pytest.mark.parametrize("rows", [(4, 6), (2, 3, 20_000)])
def test_states_in_integers_compute_the_same(elsewhere, rows):
    x = some(*rows)
    state = fixed_point.start(x)
    codes, scale = fixed_point.encode_fixed(x + 0.01, state, 8, 1.0, "tensor")
    with torch.device("cpu"):
        again = fixed_point.start(x)
        expected = fixed_point.encode_fixed(x + 0.01, again, 8, 1.0, "tensor")
    assert_same_bits(codes, expected[0])
    assert_same_bits(scale, expected[1])
    assert_same_bits(state.n, again.n)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight", [None, some(24)])
def test_a_fused_norm_computes_the_same(elsewhere, layout, weight):
    x = some(2, 24, 5, 4).to(memory_format=layout)
    fusion = InputFusion("group", 4, weight, weight, 1e-5, "silu")
    codes, _ = fusion.encode(x, torch.zeros_like(x), None, 8, channel_dim=1)
    with torch.device("cpu"):
        expected, _ = fusion.encode(x, torch.zeros_like(x), None, 8, channel_dim=1)
    assert_same_bits(codes, expected)


def forget() -> None:
    """What oneDNN's operators are given, and whether they are right, is found again."""
    for kept in (onednn.self_test, onednn._one, onednn._zero_point):
        kept.cache_clear()


@pytest.mark.parametrize("problem", [Problem(12, 5, bits=4), Problem(4, 3, (3, 3), (1, 1), (1, 1), (1, 1), bits=4)])
def test_the_self_test_and_products_compute_the_same(elsewhere, problem):
    forget()
    shape = (5, 12) if not problem.kernel_size else (3, 4, 3, 3)
    weights, scales = (some(*shape) * 2).to(torch.int8), some(shape[0]).abs()
    codes = torch.full((6, 12) if not problem.kernel_size else (2, 4, 5, 5), 9, dtype=torch.uint8, device="cpu")
    scale = torch.ones((), dtype=torch.float32, device="cpu")
    made = kernel.Kernel(problem, weights, scales)
    found = made.compute(codes, scale)
    forget()
    with torch.device("cpu"):
        again = kernel.Kernel(problem, weights, scales)
        assert_same_bits(found, again.compute(codes, scale))
    assert made.choice == again.choice
