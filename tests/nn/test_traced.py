"""The operator that a layer is in a graph: what it promises while it is traced is what it returns."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import modiff
from modiff import AttentionConfig, LayerConfig, StateError, presets
from modiff.nn import traced
from modiff.nn.attention import QuantizedAttention
from modiff.nn.clock import Clock
from tests.helpers import assert_same_bits
from tests.model.toys import SHAPE, Attention, Toy, toy
from tests.recipes import quantized, randomised

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
    plain = quantized(randomised(make()), LayerConfig(modulation=None))  # no memory: every call gives the same
    inputs = [torch.randn(shape).to(dtype)]
    inputs += [inputs[0].contiguous(memory_format=torch.channels_last)] if len(shape) == 4 else []
    for x in inputs:
        torch.library.opcheck(traced.layer, (plain.clock.token, x, plain.number), test_utils="test_faketensor")
        assert torch.equal(traced.layer(plain.clock.token, x, plain.number), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_known_before_it_runs(dtype):
    attention = QuantizedAttention(AttentionConfig(), "attention", Clock("model"))
    q, k, v = (torch.randn(2, 3, length, size).to(dtype) for length, size in ((5, 8), (7, 8), (7, 6)))
    q = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    mask = torch.ones(5, 7, dtype=torch.bool).tril()
    for arguments in ((None, 0.0, True, 0.3, False), (mask, 0.0, False, None, False)):
        call = (attention.clock.token, q, k, v, *arguments, attention.number)
        torch.library.opcheck(traced.attend, call, test_utils="test_faketensor")
        expected = attention.attend(q, k, v, arguments[0], is_causal=arguments[2], scale=arguments[3])
        assert torch.equal(traced.attend(*call), expected)
    assert copy.deepcopy(attention).number != attention.number


@pytest.mark.parametrize("name", ["begin", "layer", "fused_layer", "attend", "end"])
def test_no_cuda_graph_may_hold_the_operators_that_run_python(name) -> None:
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.modiff, name).default.tags


def dual(call, x):
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(x, x))


TRANSFORMS = {
    "vmap": lambda call, x: torch.vmap(lambda row: call(row[None]))(x),
    "grad": lambda call, x: torch.func.grad(lambda x: call(x).sum())(x),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,)),
    "forward mode": dual,
}


class Inside(Attention):
    """Transforms its layers by itself."""

    transform = ""

    def forward(self, tokens: Tensor) -> Tensor:
        TRANSFORMS[self.transform](super().forward, tokens)
        return tokens


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_is_refused_and_leaves_the_model_as_it_was(transform, inside):
    def changed(model: Toy) -> Toy:
        if inside:
            model.attention.__class__, model.attention.transform = Inside, transform
        return model

    model, x = toy(), torch.randn(SHAPE)
    exact = model(x, 900.0)
    modiff.apply(changed(model), presets.w8a8())
    with (
        modiff.trajectory(model),
        pytest.raises(StateError, match=r"(Toy|attention\..*): expected an evaluation of ten"),
    ):
        model(x, 900.0) if inside else TRANSFORMS[transform](lambda x: model(x, 900.0), x)
    model.attention.__class__ = Attention
    other = toy()
    modiff.apply(other, presets.w8a8())
    results = []
    for each in (model, other):
        with torch.no_grad(), modiff.trajectory(each):
            results.append(torch.stack([each(x, 900.0), each(0.9 * x, 800.0)]))
    assert_same_bits(*results)
    modiff.remove(model)
    assert_same_bits(model(x, 900.0), exact)
