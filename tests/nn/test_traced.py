"""The operator that a layer is in a graph: what it promises while it is traced is what it returns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modiff import LayerConfig
from modiff.nn import traced
from tests.recipes import randomised, twin

LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (2, 3, 8)),
    "conv": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), (2, 8, 7, 5)),
    "conv along one axis": (lambda: nn.Conv1d(8, 6, 3), (2, 8, 9)),
    "circular conv": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), (2, 8, 4, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_dtype_and_memory_layout_are_known_before_it_runs(layer, dtype):
    make, shape = LAYERS[layer]
    plain = twin(randomised(make()), LayerConfig(modulation=None))  # no memory: every call gives the same
    inputs = [torch.randn(shape).to(dtype)]
    inputs += [inputs[0].contiguous(memory_format=torch.channels_last)] if len(shape) == 4 else []
    for x in inputs:
        torch.library.opcheck(traced.layer, (plain.clock.token, x, plain.number), test_utils="test_faketensor")
        assert torch.equal(traced.layer(plain.clock.token, x, plain.number), plain(x))


def test_no_cuda_graph_may_hold_the_operators_that_run_python() -> None:
    for name in ("begin", "layer", "end"):
        operator = getattr(torch.ops.modiff, name).default
        assert torch.Tag.cudagraph_unsafe in operator.tags, name
