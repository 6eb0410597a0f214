"""How tensors lie in memory: rows that share a scale, and where channels are innermost."""

from __future__ import annotations

import pytest
import torch

from modiff.kernels.layout import channels_innermost, innermost, row_shape


@pytest.mark.parametrize(
    ("x", "granularity", "channel", "rows"),
    [
        (torch.ones(2, 3, 4), "tensor", -1, (1, 24)),
        (torch.ones(6), "sample", -1, (1, 6)),
        (torch.ones(2, 3, 4).transpose(0, 1), "sample", -1, None),
        (torch.ones(2, 3, 4, 5), "token", 1, None),
        (innermost(torch.ones(2, 3, 4, 5)), "token", 1, (40, 3)),
        (innermost(torch.ones(2, 3, 4, 5)), "sample", 1, (2, 60)),
        (innermost(torch.ones(2, 3, 4, 5)), "token", -1, None),
        (torch.ones(0, 6), "sample", -1, None),
    ],
)
def test_tensors_are_rows_of_what_shares_a_scale_where_they_lie_dense(x, granularity, channel, rows):
    assert row_shape(x.shape, x.stride(), granularity, channel) == rows  # their order: test_encode.py


@pytest.mark.parametrize("size", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1)])
def test_channels_lie_innermost_where_torch_says_so(size):
    for x in (torch.randn(size), innermost(torch.randn(size)), torch.randn(size).transpose(2, 3)):
        assert channels_innermost(x, 2) == x.is_contiguous(memory_format=torch.channels_last)
        assert channels_innermost(x, 0) == x.is_contiguous()
