"""Layers left out of reconstruction: they keep what they have, and the rest of their block is learned around them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from modiff import ConfigError
from modiff.calibration.reconstruct.run import learn_units
from tests.calibration import learning
from tests.calibration.learning import KINDS, applied, codes_of, layers_of, same_codes, static_config, weights, widened
from tests.model.toys import toy

QUICK = dataclasses.replace(learning.QUICK, iterations=10)
STEPS = dataclasses.replace(learning.STEPS, iterations=10)


def test_excluded_layers_round_to_nearest_while_the_others_of_their_block_are_learned():
    model, calls = applied(toy, weights())
    nearest, left = codes_of(model), "attention.to_q"
    report = learn_units(model, calls, dataclasses.replace(QUICK, exclude=(left,)), kinds=KINDS, progress=False)
    assert {n for unit in report.units for n in unit.layers} == set(nearest) - {left}
    codes = codes_of(model)
    assert same_codes({left: codes[left]}, {left: nearest[left]})
    assert not layers_of(model)[left].quantized_weight.fixed
    assert any(not same_codes({n: codes[n]}, {n: nearest[n]}) for n in report.units[-1].layers)


def test_an_excluded_layer_keeps_the_rounding_that_it_learned_before_and_its_digest_knows(tmp_path):
    model, calls = applied(toy, weights())
    left = learn_units(model, calls, learning.QUICK, kinds=KINDS, progress=False).learned[0].layers[0]
    before = codes_of(model)[left]
    learn_units(model, calls, dataclasses.replace(QUICK, exclude=(left,)), kinds=KINDS, folder=tmp_path, progress=False)
    assert layers_of(model)[left].quantized_weight.fixed
    assert all(map(torch.equal, codes_of(model)[left], before))
    other, calls = applied(toy, weights())
    with pytest.raises(ConfigError, match="expected a folder of the same job"):
        learn_units(
            other, calls, dataclasses.replace(QUICK, exclude=(left,)), kinds=KINDS, folder=tmp_path, progress=False
        )


def test_static_scales_of_excluded_layers_stay_as_measured():
    model, calls = applied(toy, static_config())
    before = widened(model, calls, 3.0)
    left = list(before)[1:3]
    report = learn_units(model, calls, dataclasses.replace(STEPS, exclude=tuple(left)), kinds=KINDS, progress=False)
    after = {name: quantized.quantizer.static for name, quantized in layers_of(model).items()}
    assert all(after[name] is before[name] for name in left)
    learned = [name for unit in report.learned for name in unit.layers]
    assert learned
    assert all(not torch.equal(after[name][0].scale, before[name][0].scale) for name in learned)


def test_a_pattern_may_name_many_and_must_name_one_and_something_must_be_left():
    model, calls = applied(toy, weights())
    with pytest.raises(ConfigError, match=r"exclude: expected patterns that match a layer, got 'conv9'.* body,"):
        learn_units(model, calls, dataclasses.replace(QUICK, exclude=("body", "conv9")), kinds=KINDS, progress=False)
    with pytest.raises(ConfigError, match=r"expected layers to learn, got none\. All of them are excluded"):
        learn_units(model, calls, dataclasses.replace(QUICK, exclude=("*",)), kinds=KINDS, progress=False)
