"""AdaRound: the formulas against plain Python, and learned rounding against every way to round twelve weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modiff import ConfigError
from modiff.core.adaround import AdaRound, beta_at, rectified_sigmoid
from modiff.core.affine import QParams, choose_qparams, fake_quantize, qparams_from_range
from tests.helpers import assert_same_bits, assert_within
from tests.reference import rounding as reference

BITS, SEEDS = st.integers(2, 8), st.integers(0, 2**31)


def weights_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channel_scales(weight: Tensor, bits: int, clip: float = 1.0) -> QParams:
    return choose_qparams(weight, bits, "input_channel", channel_dim=0, clip=clip)


def each(function, *tensors: Tensor) -> Tensor:
    """A function of plain numbers on every element."""
    wide = torch.broadcast_tensors(*tensors)
    rows = zip(*(t.flatten().tolist() for t in wide), strict=True)
    return torch.tensor([function(*row) for row in rows], dtype=torch.float64).reshape(wide[0].shape)


@given(seed=SEEDS, bits=BITS, clip=st.sampled_from([1.0, 0.6]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_learning_starts_at_the_weight_itself(seed, bits, clip, dtype):
    """h(v) = frac(W / s), so the soft weight is W, or the end of the range where the scale cuts W off."""
    weight = weights_of(seed, 3, 5).to(dtype)
    qparams = channel_scales(weight, bits, clip)
    learned = AdaRound(weight, qparams, bits)
    ratio = weight / qparams.scale
    eps = torch.finfo(dtype).eps
    assert_within(rectified_sigmoid(learned.logits), ratio - ratio.floor(), 4 * eps)
    low, high = (q * qparams.scale for q in reference.bounds(bits))
    bound = 8 * eps * reference.bounds(bits)[1] * qparams.scale + 8 * eps * weight.abs()
    assert_within(learned.soft(), torch.maximum(torch.minimum(weight, high), low), bound)


@given(seed=SEEDS, bits=BITS, symmetric=st.booleans(), beta=st.floats(2, 20))
def test_soft_weight_codes_and_penalty_equal_the_reference(seed, bits, symmetric, beta):
    weight = weights_of(seed, 2, 7)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    qparams = qparams_from_range(low, high, bits, symmetric=symmetric, clip=0.8)
    learned = AdaRound(weight, qparams, bits)
    with torch.no_grad():
        learned.logits.copy_(3 * weights_of(seed + 1, 2, 7))
    zero = torch.zeros(2, 1, dtype=torch.int32) if qparams.zero_point is None else qparams.zero_point
    facts = (weight, qparams.scale, zero)
    soft = each(lambda w, s, z, v: reference.soft(w, s, z, bits, v), *facts, learned.logits.detach())
    codes = each(lambda w, s, z, v: reference.code(w, s, z, bits, v), *facts, learned.logits.detach())
    assert_within(learned.soft(), soft, 1e-12)
    assert_same_bits(learned.codes(), codes.to(torch.int8))
    assert_within(learned.hard(), qparams.scale * (codes - zero), 1e-12)
    expected = reference.penalty(learned.logits.flatten().tolist(), beta)
    assert learned.penalty(beta).item() == pytest.approx(expected, rel=1e-12)


def test_gradients_equal_finite_differences():
    weight = weights_of(3, 2, 6)
    learned = AdaRound(weight, channel_scales(weight, 4), 4)
    target = weights_of(4, 2, 6)
    with torch.no_grad():
        learned.logits.copy_(weights_of(5, 2, 6))  # away from the corners of h

    def loss() -> Tensor:
        return (learned.soft() - target).square().sum() + 0.3 * learned.penalty(5.0)

    (gradient,) = torch.autograd.grad(loss(), [learned.logits])
    for i in range(weight.numel()):
        with torch.no_grad():
            learned.logits.view(-1)[i] += 1e-6
            above = loss().item()
            learned.logits.view(-1)[i] -= 2e-6
            below = loss().item()
            learned.logits.view(-1)[i] += 1e-6
        assert gradient.flatten()[i].item() == pytest.approx((above - below) / 2e-6, rel=1e-5, abs=1e-7)


def test_the_penalty_starts_after_a_fifth_and_falls_on_a_line():
    assert [beta_at(i, 50) for i in range(10)] == [None] * 10
    assert [beta_at(i, 50) for i in range(10, 51)] == pytest.approx([2 + 18 * (50 - i) / 40 for i in range(10, 51)])


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(ConfigError, match="AdaRound: expected finite weights, got NaN"):
        AdaRound(torch.tensor([[1.0, torch.nan]]), QParams(torch.ones(1, 1), None), 4)


BITS_OF_TOY = 4


class Regression:
    """Twelve weights and inputs with a common mean, as after SiLU, so that rounding errors add up or cancel.

    The loss is the mean square of the output's error, E |(W_q - W) x|^2.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = 0.3 * (torch.randn(64, 12, generator=generator).double() + 1)
        self.weight = torch.randn(1, 12, generator=generator).double()
        self.covariance = x.T @ x / 64
        self.qparams = channel_scales(self.weight, BITS_OF_TOY)

    def loss(self, rounded: Tensor) -> Tensor:
        """One number a row of `rounded`."""
        error = rounded - self.weight
        return (error @ self.covariance * error).sum(1)

    def best(self) -> float:
        """The least loss of all 2^12 ways to round each weight down or up."""
        weight, scale = self.weight[0].tolist(), float(self.qparams.scale)
        loss = lambda rounded: float(self.loss(torch.tensor([rounded]).double()))  # noqa: E731
        return reference.best_rounding(weight, scale, BITS_OF_TOY, loss)

    def nearest(self) -> float:
        return float(self.loss(fake_quantize(self.weight, self.qparams, BITS_OF_TOY)))

    def learned(self, iterations: int = 500) -> float:
        """AdaRound with Q-Diffusion's settings."""
        rounding = AdaRound(self.weight, self.qparams, BITS_OF_TOY)
        optimizer = torch.optim.Adam([rounding.logits], lr=0.02)
        for i in range(iterations):
            loss, beta = self.loss(rounding.soft()).sum(), beta_at(i, iterations)
            loss = loss if beta is None else loss + 0.01 * rounding.penalty(beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(self.loss(rounding.hard()))


@pytest.mark.parametrize("seed", [1, 5, 11])
def test_learned_rounding_of_twelve_weights_is_within_a_tenth_of_the_best_of_all_4096(seed):
    """On problems whose best rounding is not the nearest: there learning must find what nearest misses."""
    toy = Regression(seed)
    best, nearest, learned = toy.best(), toy.nearest(), toy.learned()
    assert nearest > 1.3 * best, "nearest is as good, so nothing is tested"
    assert learned >= best * (1 - 1e-9), "the exhaustive search missed something"
    assert learned <= 1.1 * best
    assert learned < 0.8 * nearest
