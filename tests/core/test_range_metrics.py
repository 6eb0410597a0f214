"""Range metrics against the sums they stand for, one Python number at a time, and the searches against all trials."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modiff import ConfigError
from modiff.core.affine import QParams, fake_quantize, qparams_from_range
from modiff.core.observers import CosineObserver, KLObserver, L1Observer, MSEObserver, RangeSearchObserver
from modiff.core.range_metrics import BINS, RANGE_METRICS, l1

SEARCHES = {"l1": L1Observer, "mse": MSEObserver, "cosine": CosineObserver, "kl": KLObserver}


def value_of(x: float, scale: float, zero: int, bits: int) -> tuple[int, float]:
    code = min(max(round(x / scale) + zero, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    return code, scale * (code - zero)


def reference(name: str, values: list[float], scale: float, zero: int, bits: int) -> float:
    """The metric in float64, by loops."""
    coded = [value_of(x, scale, zero, bits) for x in values]
    if name in ("l1", "mse"):
        p = 1.0 if name == "l1" else 2.4
        return sum(abs(x - q) ** p for x, (_, q) in zip(values, coded, strict=True)) / len(values)
    if name == "cosine":
        product = sum(x * q for x, (_, q) in zip(values, coded, strict=True))
        norms = math.sqrt(sum(x * x for x in values)) * math.sqrt(sum(q * q for _, q in coded))
        return 1 - product / norms
    low, high = min(values), max(values)
    width = (high - low) / BINS
    mass = [0.0] * BINS
    for x in values:
        mass[min(int((x - low) / width), BINS - 1)] += 1 / len(values)
    codes = [value_of(low + (i + 0.5) * width, scale, zero, bits)[0] for i in range(BINS)]
    total = 0.0
    for code in set(codes):
        filled = [mass[i] for i in range(BINS) if codes[i] == code and mass[i] > 0]
        total += sum(m * math.log(m / (sum(filled) / len(filled))) for m in filled)
    return total


@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    ratio=st.sampled_from([1.0, 0.6, 0.2]),
)
def test_each_metric_equals_its_definition(seed, bits, symmetric, ratio):
    rows = torch.randn(2, 60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3
    low, high = rows.amin(1, keepdim=True) * ratio, rows.amax(1, keepdim=True) * ratio
    qparams = qparams_from_range(low, high, bits, symmetric=symmetric)
    for name, metric in RANGE_METRICS.items():
        found = metric(rows, qparams, bits)
        assert found.shape == (2, 1)
        for row in range(2):
            zero = 0 if qparams.zero_point is None else int(qparams.zero_point[row])
            true = reference(name, rows[row].tolist(), float(qparams.scale[row]), zero, bits)
            assert float(found[row]) == pytest.approx(true, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_search_takes_the_trial_with_the_least_loss(name, symmetric):
    x = torch.cat([torch.randn(1500), torch.tensor([7.0, -9.0])]) + 0.2
    observer = SEARCHES[name](trials=90)
    observer.observe(x)
    found = observer.qparams(4, symmetric=symmetric)
    losses: dict[float, float] = {}
    for trial in range(90):
        ratio = 1 - 0.01 * trial
        low, high = float(x.min()) * ratio, float(x.max()) * ratio
        scale = max(-low, high) / 7 if symmetric else (high - low) / 15
        zero = 0 if symmetric else -8 - round(low / scale)
        losses[scale] = reference(name, x.double().tolist(), scale, zero, 4)
    best = min(losses, key=losses.__getitem__)
    mine = min(losses, key=lambda scale: abs(scale - float(found.scale)))
    assert float(found.scale) == pytest.approx(mine, rel=1e-5)
    assert losses[mine] <= losses[best] * (1 + 1e-5) + 1e-9
    assert best < 0.9 * max(losses), "the outliers must make shrinking worth it, else the search is not tested"


def test_the_four_metrics_do_not_choose_the_same_range():
    x = torch.cat([torch.randn(4000), 12 * torch.randn(40)])
    scales = set()
    for kind in SEARCHES.values():
        observer = kind()
        observer.observe(x)
        scales.add(round(float(observer.qparams(4).scale), 6))
    assert len(scales) >= 3


def test_a_hundred_trials_reach_a_hundredth_of_the_range():
    x = torch.cat([torch.randn(100_000), torch.tensor([300.0])])
    observer = L1Observer(trials=100)
    observer.observe(x)
    shorter = L1Observer(trials=80)
    shorter.observe(x)
    whole = 300 / 7
    assert float(observer.qparams(4).scale) == pytest.approx(0.01 * whole, rel=1e-4)
    assert float(shorter.qparams(4).scale) >= 0.2 * whole


def test_cosine_is_one_where_nothing_is_left():
    rows = torch.full((1, 4), 0.1)
    assert RANGE_METRICS["cosine"](rows, QParams(torch.ones(1, 1), None), 4).item() == 1.0


@pytest.mark.parametrize("name", RANGE_METRICS)
def test_a_constant_row_has_a_finite_loss(name):
    rows = torch.zeros(1, 8)
    qparams = qparams_from_range(rows[:, :1], rows[:, :1], 4)
    assert torch.isfinite(RANGE_METRICS[name](rows, qparams, 4)).all()


def test_each_row_has_a_range_of_its_own():
    x = torch.randn(3, 500) * torch.tensor([[1.0], [10.0], [100.0]])
    together = RangeSearchObserver(0, l1, 50)
    together.observe(x)
    for row in range(3):
        alone = RangeSearchObserver(None, l1, 50)
        alone.observe(x[row])
        assert float(together.qparams(4).scale[row]) == pytest.approx(float(alone.qparams(4).scale), rel=1e-6)


@pytest.mark.parametrize("kind", [L1Observer, CosineObserver, KLObserver, RangeSearchObserver])
@pytest.mark.parametrize("trials", [0, 101])
def test_other_numbers_of_trials_are_refused(kind, trials):
    with pytest.raises(ConfigError, match=f"{kind.__name__}: expected 1 to 100 trials, got trials={trials}"):
        kind(trials=trials)


def test_the_search_pays_at_low_bits():
    x = torch.cat([torch.randn(5000), torch.tensor([30.0])])
    observer = MSEObserver()
    observer.observe(x)
    searched, whole = observer.qparams(4), qparams_from_range(-x.abs().max(), x.abs().max(), 4)
    errors = [float((x - fake_quantize(x, q, 4)).square().mean()) for q in (searched, whole)]
    assert errors[0] < 0.4 * errors[1]
