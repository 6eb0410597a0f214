"""Learned step sizes: the plain quantizer's value bit for bit, with the gradients of the surrogate."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modiff.core.affine import QParams, choose_qparams, fake_quantize
from modiff.core.learned_scale import LearnedScale, fake_quantize_through
from tests.helpers import assert_same_bits, assert_within
from tests.reference import rounding as reference

BITS, SEEDS = st.integers(2, 8), st.integers(0, 2**31)


def values_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(x: Tensor, qparams: QParams) -> list[tuple[float, float, int]]:
    """(x, scale, zero point) of each element."""
    zero = torch.zeros_like(qparams.scale) if qparams.zero_point is None else qparams.zero_point
    wide = torch.broadcast_tensors(x, qparams.scale, zero)
    return [(a, s, int(z)) for a, s, z in zip(*(t.flatten().tolist() for t in wide), strict=True)]


@given(
    seed=SEEDS,
    bits=BITS,
    symmetric=st.booleans(),
    clip=st.sampled_from([1.0, 0.3]),
    granularity=st.sampled_from(["tensor", "token"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_value_is_that_of_the_plain_quantizer(seed, bits, symmetric, clip, granularity, dtype):
    x = values_of(seed, 4, 9).to(dtype)
    qparams = choose_qparams(x, bits, granularity, symmetric=symmetric, clip=clip)
    assert_same_bits(fake_quantize_through(x, qparams, bits), fake_quantize(x, qparams, bits))


@given(seed=SEEDS, bits=BITS, symmetric=st.booleans(), clip=st.sampled_from([1.0, 0.3]))
def test_gradients_equal_the_reference(seed, bits, symmetric, clip):
    x = values_of(seed, 3, 7).requires_grad_()
    qparams = choose_qparams(x.detach(), bits, "token", symmetric=symmetric, clip=clip)
    scale = qparams.scale.clone().requires_grad_()
    weights = values_of(seed + 1, 3, 7)
    loss = (weights * fake_quantize_through(x, QParams(scale, qparams.zero_point), bits)).sum()
    by_x, by_scale = torch.autograd.grad(loss, [x, scale])
    facts = numbers(x.detach(), qparams)
    steps = torch.tensor([reference.step_gradient(a, s, z, bits) for a, s, z in facts], dtype=torch.float64)
    inputs = torch.tensor([reference.input_gradient(a, s, z, bits) for a, s, z in facts], dtype=torch.float64)
    assert_within(by_x, weights * inputs.reshape(3, 7), 1e-12)
    assert_within(by_scale, (weights * steps.reshape(3, 7)).sum(1, keepdim=True), 1e-9)


def test_a_learned_step_moves_in_shares_of_itself_and_stays_positive():
    """One Adam iteration changes a scale of 10 and one of 1e-4 by the same factor, whatever the gradients are."""
    x = torch.cat([values_of(0, 1, 64), 1e-5 * values_of(1, 1, 64)])
    step = LearnedScale(QParams(torch.tensor([[10.0], [1e-4]]).double(), None), 4)
    before = step.frozen().scale
    optimizer = torch.optim.Adam([step.theta], lr=0.01)
    (step(x) - x).abs().sum().backward()
    optimizer.step()
    ratio = step.frozen().scale / before
    assert_within(ratio.log().abs(), torch.full((2, 1), 0.01).double(), 1e-5)
    kept, point = step.frozen().scale, torch.tensor(3, dtype=torch.int32)
    with torch.no_grad():
        step.theta.fill_(-1000.0)
    assert (step.frozen().scale > 0).all()
    assert (kept > 1e-5).all(), "what is frozen is a copy"
    assert LearnedScale(QParams(torch.tensor(0.5), point), 4).frozen().zero_point is point
