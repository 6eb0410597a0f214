"""How tensors lie in memory: rows that share a scale, in the order of the scales."""

from __future__ import annotations

import pytest
import torch

from modiff.kernels.layout import channels_innermost, row_shape, scale_shape
from tests.kernels.problems import innermost


@pytest.mark.parametrize(
    ("shape", "inner", "granularity", "channel", "rows"),
    [
        ((2, 3, 4), False, "tensor", -1, (1, 24)),
        ((2, 3, 4), False, "sample", -1, (2, 12)),
        ((2, 3, 4), False, "token", -1, (6, 4)),
        ((2, 3, 4, 5), True, "token", 1, (40, 3)),
        ((2, 3, 4, 5), True, "sample", 1, (2, 60)),
        ((2, 3, 4, 5), False, "token", 1, None),
        ((2, 3, 4, 5), True, "token", -1, None),
        ((2, 3, 4), False, "input_channel", -1, None),
        ((6,), False, "sample", -1, (1, 6)),
        ((0, 6), False, "sample", -1, None),
    ],
)
def test_rows_are_views_whose_order_is_that_of_the_scales(shape, inner, granularity, channel, rows):
    x = innermost(torch.randn(shape)) if inner else torch.randn(shape)
    assert row_shape(x.shape, x.stride(), granularity, channel) == rows
    if rows is not None and granularity != "tensor":
        shared = [axis for axis, size in enumerate(scale_shape(shape, granularity, channel)) if size == 1 < shape[axis]]
        assert torch.allclose(x.as_strided(rows, (rows[1], 1)).mean(1), x.mean(shared).reshape(-1), atol=1e-6)


@pytest.mark.parametrize("size", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1)])
def test_channels_lie_innermost_where_torch_says_so(size):
    for x in (torch.randn(size), innermost(torch.randn(size)), torch.randn(size).transpose(2, 3)):
        assert channels_innermost(x, 2) == x.is_contiguous(memory_format=torch.channels_last)
        assert channels_innermost(x, 0) == x.is_contiguous()
