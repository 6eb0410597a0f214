"""Scales held over some steps: measured when due, the very same in between, and errors that are sent later."""

from __future__ import annotations

import pytest
import torch

from modiff import ConfigError, LayerConfig, ModulationConfig, QuantizerConfig
from modiff.core.held_scales import HeldScales
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import State, encode
from tests.helpers import assert_same_bits, assert_within, drifting


def held(every: int, bits: int = 4, segments: tuple[int, ...] = (8,)) -> HeldScales:
    config = QuantizerConfig(bits=bits, granularity="token", refresh_every=every)
    return HeldScales(Quantizer(config, "token", -1, segments))


@pytest.mark.parametrize(("every", "measured"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 2, 2, 4]), (3, [0, 0, 0, 3, 3])])
def test_each_residual_is_coded_with_the_scale_of_the_last_one_that_was_measured(every, measured):
    quantizer = held(every)
    residuals = [x * (i + 1) for i, x in enumerate(drifting(0, (3, 8), 5, 0.4))]
    for residual, source in zip(residuals, measured, strict=True):
        code = quantizer(residual)
        assert code is not None
        ((codes, qparams),) = code.parts
        assert_within(qparams.scale, residuals[source].abs().amax(1, keepdim=True) / 7, 1e-15)
        assert_same_bits(codes, (residual / qparams.scale).round().clamp(-8, 7).to(torch.int8))


def test_what_an_old_scale_clips_is_sent_later():
    """A jump between two measurements: clipped at once, and gone after a few steps of a constant input."""
    quantizer, config = held(4), ModulationConfig(state_dtype="float64")
    x, jumped = torch.ones(1, 8, dtype=torch.float64), 50 * torch.ones(1, 8, dtype=torch.float64)
    state: State | None = None
    errors = []
    for value in (x, x + 0.1, *[jumped] * 6):
        _, state = encode(value, state, quantizer, config)
        errors.append(float((value - state.value).abs().max()))
    assert errors[2] > 40  # the scale was made for 0.1
    assert errors[-1] < 0.1


def test_a_restart_measures_again_and_the_start_of_the_states_does_not_count():
    quantizer = held(3)
    quantizer(torch.ones(1, 8))
    quantizer.restart()
    quantizer.fresh(torch.ones(1, 8) * 5)
    code = quantizer(torch.ones(1, 8) * 7)
    assert code is not None
    assert float(code.parts[0][1].scale) == 1.0


def test_segments_keep_scales_of_their_own():
    quantizer = held(2, segments=(5, 3))
    first, second = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 8)
    one, two = quantizer(first), quantizer(second)
    assert one is not None
    assert two is not None
    for (_, before), (_, after) in zip(one.parts, two.parts, strict=True):
        assert_same_bits(after.scale, before.scale)


def test_zero_bits_send_nothing():
    assert held(2, bits=0)(torch.ones(1, 8)) is None


def test_held_scales_need_dynamic_ones_and_a_memory():
    with pytest.raises(ConfigError, match="refresh_every: expected 1 or more steps, got 0"):
        QuantizerConfig(refresh_every=0)
    with pytest.raises(ConfigError, match="refresh_every: expected 1 with dynamic=False, got 2"):
        QuantizerConfig(refresh_every=2, dynamic=False)
    with pytest.raises(ConfigError, match="refresh_every: expected 1 without modulation, got 2"):
        LayerConfig(activation=QuantizerConfig(refresh_every=2), modulation=None)
