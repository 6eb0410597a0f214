"""Quantizers: codes of each run, static scales, what the observers see, and the ceiling of the codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modiff import CalibrationError, ConfigError, QuantizerConfig
from modiff.core.observers import MinMaxObserver
from modiff.core.quantizer import Quantizer
from tests.helpers import assert_same_bits, assert_within
from tests.reference.quantizer import quantize_runs
from tests.strategies import CLIPS


def quantizer_of(runs=(8,), granularity="tensor", channel_dim=-1, **settings) -> Quantizer:
    return Quantizer(QuantizerConfig(**settings), granularity, channel_dim, runs)


def calibrated(quantizer: Quantizer, *tensors: torch.Tensor) -> Quantizer:
    quantizer.watch(MinMaxObserver)
    for x in tensors:
        quantizer(x)
    quantizer.freeze()
    return quantizer


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["tensor", "sample", "token", "input_channel"]),
    runs=st.sampled_from([(8,), (3, 5), (6, 2)]),
    symmetric=st.booleans(),
    clip=CLIPS,
    channel_dim=st.sampled_from([1, -1]),
)
def test_codes_and_value_equal_the_reference(seed, bits, granularity, runs, symmetric, clip, channel_dim):
    shape = (2, 3, 8) if channel_dim == -1 else (2, 8, 3)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    quantizer = quantizer_of(runs, granularity, channel_dim, bits=bits, symmetric=symmetric, clip=clip)
    expected = quantize_runs(x, runs, bits, granularity, symmetric=symmetric, clip=clip, channel_dim=channel_dim)
    code = quantizer(x)
    assert_same_bits(torch.cat([codes for codes, _ in code.parts], channel_dim), expected.codes.to(torch.int8))
    assert_within(code.value(), expected.value, 1e-12)


@pytest.mark.parametrize("clip", [1.0, 0.4])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_never_leave_their_range_on_a_stale_static_scale(bits, clip):
    """A fixed clamp at +-127 lets "4 bits" send codes of 100 and flatters every low bit width."""
    quantizer = calibrated(quantizer_of(bits=bits, dynamic=False, clip=clip), torch.randn(4, 8))
    codes, _ = quantizer(50 * torch.randn(64, 8)).parts[0]
    assert codes.min() == -(2 ** (bits - 1))
    assert codes.max() == 2 ** (bits - 1) - 1


def scale_of(quantizer: Quantizer, largest: float) -> list[float]:
    return [float(qparams.scale) for _, qparams in quantizer(torch.full((1, 8), largest)).parts]


def test_static_scales_stay_as_measured_and_while_they_are_measured_each_tensor_has_its_own():
    quantizer = quantizer_of((3, 5), bits=4, dynamic=False)
    quantizer.watch(MinMaxObserver)
    assert scale_of(quantizer, 70.0) == [10.0] * 2
    assert scale_of(quantizer, 7.0) == [1.0] * 2
    quantizer.freeze()
    assert scale_of(quantizer, 7.0) == [10.0] * 2
    assert torch.equal(quantizer(torch.full((2, 8), 22.0)).value(), torch.full((2, 8), 20.0))
    quantizer.watch(MinMaxObserver)
    quantizer(torch.full((1, 8), 700.0))
    quantizer.unwatch()
    assert scale_of(quantizer, 7.0) == [10.0] * 2


def test_static_scales_of_float32_serve_float64_residuals_and_the_other_way():
    for measured, used in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        quantizer = calibrated(quantizer_of(bits=4, dynamic=False, symmetric=False), torch.randn(2, 8, dtype=measured))
        assert quantizer(torch.randn(2, 8, dtype=used)).value().dtype == used


def test_what_has_no_scale_says_why_and_a_static_one_for_each_sample_is_one_for_all():
    x, steps = torch.ones(2, 8), quantizer_of(bits=4, dynamic=False, step_groups=0)
    with pytest.raises(CalibrationError, match="expected measured scales, got none"):
        quantizer_of(bits=4, dynamic=False)(x)
    with pytest.raises(ConfigError, match=r"Quantizer\.bits: expected 0 or 2 to 8, got None"):
        quantizer_of(bits=None)
    steps.watch(MinMaxObserver)
    with pytest.raises(CalibrationError, match="expected a clock that tells the steps apart"):
        steps(x)
    with pytest.raises(CalibrationError, match="expected at least one tensor, got none"):
        steps.freeze()
    for granularity in ("sample", "token"):
        assert quantizer_of(granularity=granularity, bits=4, dynamic=False).granularity == "tensor"
    assert quantizer_of(bits=0).fresh(x) is None


def test_each_step_has_the_scale_that_was_measured_there_and_others_have_none():
    now = [0.0]
    quantizer = Quantizer(QuantizerConfig(bits=4, dynamic=False, step_groups=0), "tensor", -1, (8,), lambda: (now[0],))
    quantizer.watch(MinMaxObserver)
    assert quantizer.saw_nothing
    for now[0], largest in ((900.0, 70.0), (500.0, 7.0), (900.0, 35.0)):
        quantizer(torch.full((1, 8), largest))
    assert not quantizer.saw_nothing
    quantizer.freeze()
    assert quantizer.static is None
    assert sorted(quantizer.tables) == [0, 1]
    for now[0], scale in ((900.0, 10.0), (500.0, 1.0)):
        assert scale_of(quantizer, 7.0) == pytest.approx([scale])
    now[0] = 700.0
    with pytest.raises(CalibrationError, match="got timestep 700"):
        quantizer(torch.full((1, 8), 7.0))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("dynamic", [True, False])
def test_an_always_zero_quantizer_spends_all_its_codes_from_zero_up(bits, dynamic):
    """Always-zero: min fixed to 0; 2^b codes from 0 to the largest value, none below."""
    x = torch.rand(4, 8, dtype=torch.float64) + 0.5  # its smallest value is far from 0
    quantizer = quantizer_of(bits=bits, symmetric=False, lowest="zero", dynamic=dynamic)
    if not dynamic:
        quantizer.watch(MinMaxObserver)
        quantizer(x)
        quantizer.freeze()
    ((codes, qparams),) = quantizer(x).parts
    step = float(x.max()) / (2**bits - 1)
    assert float(qparams.scale) == pytest.approx(step, rel=1e-9)
    assert int(qparams.zero_point) == -(2 ** (bits - 1))
    assert int(codes.max()) == 2 ** (bits - 1) - 1
    assert_within(quantizer(x).value(), x, step / 2 * (1 + 1e-9))
    assert codes.dtype == (torch.int16 if bits == 16 else torch.int8)
    if dynamic:  # negative values do not widen the range
        x[0, 0] = -3.0
        assert_within(quantizer(x).value(), x.clamp_min(0), step / 2 * (1 + 1e-9))


@pytest.mark.parametrize("step_groups", [1, 2])
def test_measured_scales_are_moved_to_the_device_of_the_input_once(step_groups: int) -> None:
    config = QuantizerConfig(bits=4, dynamic=False, step_groups=step_groups)
    quantizer = Quantizer(config, "tensor", -1, (4,), moment=lambda: (5.0,))
    quantizer.watch(MinMaxObserver)
    quantizer(torch.ones(2, 4))
    quantizer.freeze()
    (first,), (second,) = (quantizer.scales(torch.empty(2, 4, device="meta")) or () for _ in range(2))
    assert first.device.type == "meta"
    assert first is second


def test_each_step_has_the_bits_of_its_group_and_as_many_groups_as_there_are_bits():
    now, config = [0.0], QuantizerConfig(bits=8, dynamic=False, step_groups=2, step_bits=(3, 8))
    quantizer = Quantizer(config, "tensor", -1, (8,), lambda: (now[0],))
    quantizer.watch(MinMaxObserver)
    x = torch.linspace(-1, 1, 8)[None]
    for now[0] in (900.0, 500.0):
        quantizer(x)
    quantizer.freeze()
    for now[0], bits in ((900.0, 3), (500.0, 8)):
        ((codes, qparams),) = quantizer(x).parts
        assert float(qparams.scale) == pytest.approx(1 / (2 ** (bits - 1) - 1))
        assert int(codes.max()) == 2 ** (bits - 1) - 1
    quantizer.watch(MinMaxObserver)
    quantizer(x)
    with pytest.raises(CalibrationError, match=r"expected 2 steps or more, one for each of step_bits, got 1\."):
        quantizer.freeze()
    for bits in ((3, 4), (8,), (3, 8, 8), (1, 8)):
        with pytest.raises(ConfigError, match=r"step_bits: expected 2 numbers, 2 to 8, one for each of"):
            QuantizerConfig(bits=8, dynamic=False, step_groups=2, step_bits=bits)


@pytest.mark.parametrize(
    ("weight_noise", "kept", "same", "moves", "of_values"),
    [(1.5e-5, 0.0, False, 0.1, True), (1e-5, 0.2, False, 0.1, True), (1.5e-5, 1.0, False, 0.1, False),
     (1.5e-5, 1.0, True, 0.1, True), (0.0, 1.0, False, 0.0, False), (0.0, 0.0, False, 0.0, True)],
)  # fmt: skip
def test_errors_that_stay_add_up_over_the_steps_that_a_sampler_remembers(weight_noise, kept, same, moves, of_values):
    """Values need smaller scales here: codes of what moves err anew, those of what stands still as before, so does the
    weight, more on values, but for what all tokens share."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1 if same else 16, 4, generator=draw).expand(2, 16, 4)
    quantizer, sums = Quantizer(QuantizerConfig(bits=8, dynamic=False), "tensor", -1, (4,)), None
    quantizer.weight_noise = weight_noise
    quantizer.watch(MinMaxObserver)
    for step in range(8):
        value = x + moves * torch.randn(2, 1 if same else 16, 4, generator=draw)
        sums = quantizer.observe_value(value, 0.5 * x, sums, kept)
        assert sums.squares == pytest.approx(sum(kept ** (2 * i) for i in range(step + 1)))
        quantizer(1.2 * x)
    quantizer.freeze()
    assert (0 in quantizer.of_values) is of_values
