"""Each observer and each range metric against its definition, on data where the definitions differ."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modiff import CalibrationError, ConfigError
from modiff.core.affine import fake_quantize, qparams_from_range
from modiff.core.observers import (
    BINS,
    RANGE_METRICS,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    RangeSearchObserver,
    evenly_drawn,
)
from tests.helpers import assert_within

ALL = (MinMaxObserver, MovingAverageObserver, PercentileObserver, MSEObserver)


def ranges(observer: Observer) -> list[float]:
    return [side.item() for side in observer.range()]


def test_a_moving_average_weighs_the_newest_extremes_with_one_minus_momentum():
    observer = MovingAverageObserver(momentum=0.75)
    low = high = None
    for a, b in ((-4.0, 4.0), (0.0, 8.0), (-2.0, 0.0)):
        observer.observe(torch.tensor([a, b]))
        low = a if low is None else 0.75 * low + 0.25 * a
        high = b if high is None else 0.75 * high + 0.25 * b
    assert ranges(observer) == pytest.approx([low, high])
    other = MovingAverageObserver()  # merged, each side weighs as many tensors as it saw
    other.observe(torch.tensor([-8.0, 8.0]))
    other.merge(observer)
    assert ranges(other) == pytest.approx([(-8.0 + 3 * low) / 4, (8.0 + 3 * high) / 4])


@pytest.mark.parametrize("kind", ALL)
def test_one_range_for_each_channel_of_the_axis_asked_for(kind):
    x = (torch.randn(2, 3, 50) * torch.tensor([1.0, 10.0, 100.0])[None, :, None]).bfloat16()
    observer, alone = kind(channel_dim=1), kind()
    observer.observe(x)
    alone.observe(x[:, 1])
    scale, narrow = observer.qparams(8).scale, observer.qparams(8, clip=0.5).scale
    assert (scale.shape, scale.dtype) == ((1, 3, 1), torch.float32)
    assert scale[0, 1].item() == pytest.approx(alone.qparams(8).scale.item(), rel=1e-6)
    if kind is not MSEObserver:  # it searches the best range for the clipped quantizer
        assert_within(narrow, scale / 2, 1e-6 * scale)
    with pytest.raises(CalibrationError, match=f"{kind.__name__}: expected at least one tensor, got none"):
        kind().qparams(8)


def test_a_percentile_leaves_out_the_same_share_on_either_side():
    observer = PercentileObserver(percentile=80.0)
    observer.observe(torch.randperm(101).float()[:50])  # 0 .. 100 in two tensors, in no order
    observer.observe(torch.tensor(sorted(set(range(101)) - set(observer.kept[0].flatten().int().tolist()))).float())
    asymmetric = observer.qparams(8, symmetric=False)
    assert asymmetric.scale.item() == pytest.approx(90 / 255)  # the range is widened to hold zero: [0, 90]
    assert observer.qparams(8).scale.item() == pytest.approx(90 / 127)


def test_the_mse_search_pays_on_outliers_and_keeps_the_whole_range_without_any():
    outlier, uniform = torch.cat([torch.randn(30_000), torch.tensor([12.0])]), torch.linspace(-1, 1, 3001)
    for x, pays in ((outlier, True), (uniform, False)):
        search, minmax = MSEObserver(), MinMaxObserver()
        search.observe(x)
        minmax.observe(x)
        error = [float((x - fake_quantize(x, o.qparams(4), 4)).abs().pow(2.4).mean()) for o in (search, minmax)]
        assert error[0] < 0.5 * error[1] if pays else error[0] <= error[1]
        assert (search.qparams(4).scale < 0.9 * minmax.qparams(4).scale).item() is pays


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MovingAverageObserver(momentum=1.0), r"momentum: expected a number in \[0, 1\), got 1.0"),
        (lambda: PercentileObserver(percentile=0.0), r"percentile: expected \(0, 100\], got 0.0"),
        (lambda: MSEObserver(p=0.0), r"expected p > 0, got p=0.0"),
        (lambda: MSEObserver(trials=0), r"MSEObserver: expected 1 to 100 trials, got trials=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("kind", [MinMaxObserver, PercentileObserver, MSEObserver])
def test_merged_observers_know_what_both_saw(kind):
    tensors = [torch.randn(50, generator=torch.Generator().manual_seed(i)) * (1 + i) for i in range(4)]
    whole, first, second = kind(), kind(), kind()
    for i, x in enumerate(tensors):
        whole.observe(x)
        (first if i < 2 else second).observe(x)
    first.merge(second)
    assert first.qparams(4).scale.item() == pytest.approx(whole.qparams(4).scale.item(), rel=1e-6)
    empty = kind()
    empty.merge(whole)
    assert ranges(empty) == ranges(whole)


def test_what_is_kept_of_many_tensors_is_bounded_and_even(monkeypatch):
    monkeypatch.setattr("modiff.core.observers.KEPT_IN_ALL", 1000)
    observer = PercentileObserver(percentile=100.0)
    for i in range(60):
        observer.observe(torch.arange(100.0) + 100 * i)
    kept = torch.cat([k.flatten() for k in observer.kept])
    assert 250 <= len(kept) <= 1000
    assert ranges(observer) == [0.0, 5999.0]
    for part in range(6):  # each thousand of the 6000 values is there in about equal number
        assert 0.08 < (kept // 1000 == part).double().mean().item() < 0.28


@pytest.mark.parametrize("axes", [(512, 9), (2048, 32, 32), (1280, 10, 640)])
def test_what_is_drawn_of_a_tensor_comes_from_all_places_along_each_of_its_axes(axes):
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in axes), indexing="ij")).flatten(1)
    drawn = evenly_drawn(grid, grid.shape[1] // 18, seed=3)
    for places, length in zip(drawn, axes, strict=True):
        counts = torch.bincount(places, minlength=length).double() / (drawn.shape[1] / length)
        assert counts.mean() == pytest.approx(1)
        assert counts.std() < 1.5 / (drawn.shape[1] / length) ** 0.5  # no more uneven than chance
    assert drawn.unique(dim=1).shape[1] > 0.99 * drawn.shape[1]


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


@pytest.mark.parametrize("name", RANGE_METRICS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_search_takes_the_trial_with_the_least_loss(name, symmetric):
    x = torch.cat([torch.randn(1500), torch.tensor([7.0, -9.0])]) + 0.2
    observer = RangeSearchObserver(None, RANGE_METRICS[name], 90)
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
