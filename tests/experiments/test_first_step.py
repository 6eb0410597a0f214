"""The baseline with warm-up: exact at the first step of every trajectory, plain at all others."""

import dataclasses

import pytest
import torch
from torch import nn

import modiff
from experiments.first_step import full_precision_first_step
from modiff import presets
from modiff.errors import ConfigError, StateError
from tests.helpers import assert_same_bits, drifting
from tests.recipes import randomised

PLAIN = dataclasses.replace(presets.plain(None, 3), include=("0",))


def test_the_first_step_is_exact_and_the_others_are_plain() -> None:
    inputs = drifting(0, (2, 16), 3, 0.3, torch.float32)
    layer = randomised(nn.Linear(16, 8))
    plain, warm = nn.Sequential(layer), nn.Sequential(layer)
    for model in (plain, warm):
        modiff.apply(model, PLAIN)
    full_precision_first_step(warm)
    with torch.no_grad():
        for _ in range(2):  # every trajectory anew
            with modiff.trajectory(warm), modiff.trajectory(plain):
                assert_same_bits(warm(inputs[0]), layer(inputs[0]))
                assert not torch.equal(plain(inputs[0]), layer(inputs[0]))
                for x in inputs[1:]:
                    assert_same_bits(warm(x), plain(x))
        assert_same_bits(warm(inputs[0]), plain(inputs[0]))  # no trajectory, no first step


def test_modulated_and_plain_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(StateError, match="plain Sequential"):
        full_precision_first_step(model)
    modiff.apply(model, dataclasses.replace(presets.modulated(None, 4), include=("0",)))
    with pytest.raises(ConfigError, match="expected a plainly quantized layer"):
        full_precision_first_step(model)
