"""Layers left out of reconstruction: they keep what they have, and the rest of their block is learned around them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import modiff
from modiff import ConfigError, ReconstructConfig
from modiff.calibration.reconstruct.run import learn_units
from tests.calibration import learning
from tests.calibration.learning import KINDS, applied, codes_of, layers_of, same_codes, static_config, weights
from tests.model.toys import toy_unet

QUICK = dataclasses.replace(learning.QUICK, iterations=10)
STEPS = dataclasses.replace(learning.STEPS, iterations=10)


def without(*patterns: str, base: ReconstructConfig = QUICK) -> ReconstructConfig:
    return dataclasses.replace(base, exclude=patterns)


def test_excluded_layers_round_to_nearest_while_the_others_of_their_block_are_learned():
    model, calls = applied(toy_unet, weights())
    nearest = codes_of(model)
    whole = learn_units(model, calls, QUICK, kinds=KINDS, progress=False)
    block = next(unit for unit in whole.units if len(unit.layers) > 1)
    left, others = block.layers[0], block.layers[1:]
    again, calls = applied(toy_unet, weights())
    report = learn_units(again, calls, without(left), kinds=KINDS, progress=False)
    assert next(unit for unit in report.units if unit.name == block.name).layers == others
    assert {n for unit in report.units for n in unit.layers} == set(nearest) - {left}
    found = codes_of(again)
    assert same_codes({left: found[left]}, {left: nearest[left]})
    assert not layers_of(again)[left].quantized_weight.fixed
    learned = [name for unit in report.learned for name in unit.layers]
    assert learned
    assert any(not same_codes({n: found[n]}, {n: nearest[n]}) for n in learned)


def test_an_excluded_layer_keeps_the_rounding_that_it_learned_before_and_its_digest_knows(tmp_path):
    model, calls = applied(toy_unet, weights())
    first = learn_units(model, calls, QUICK, kinds=KINDS, progress=False)
    left = first.learned[0].layers[0]
    before = codes_of(model)[left]
    config = without(left)
    learn_units(model, calls, config, kinds=KINDS, folder=tmp_path, progress=False)
    assert layers_of(model)[left].quantized_weight.fixed
    assert all(map(torch.equal, codes_of(model)[left], before))
    other, calls = applied(toy_unet, weights())
    with pytest.raises(ConfigError, match="expected a folder of the same job"):
        learn_units(other, calls, config, kinds=KINDS, folder=tmp_path, progress=False)


def test_static_scales_of_excluded_layers_stay_as_measured():
    model, calls = applied(toy_unet, static_config())
    modiff.calibrate(model, lambda: modiff.replay(model, calls))
    before = {name: quantized.quantizer.static for name, quantized in layers_of(model).items()}
    left = list(before)[:3]
    report = learn_units(model, calls, without(*left, base=STEPS), kinds=KINDS, progress=False)
    after = {name: quantized.quantizer.static for name, quantized in layers_of(model).items()}
    assert all(after[name] is before[name] for name in left)
    learned = [name for unit in report.learned for name in unit.layers]
    assert learned
    assert all(not torch.equal(after[name][0].scale, before[name][0].scale) for name in learned)


def test_a_pattern_may_name_many_and_must_name_one_and_something_must_be_left():
    model, calls = applied(toy_unet, weights())
    first = next(iter(layers_of(model)))
    with pytest.raises(ConfigError, match=rf"exclude: expected patterns that match a layer, got 'conv9'.* {first},"):
        learn_units(model, calls, without(first, "conv9"), kinds=KINDS, progress=False)
    with pytest.raises(ConfigError, match=r"expected layers to learn, got none\. All of them are excluded"):
        learn_units(model, calls, without("*"), kinds=KINDS, progress=False)
    assert ReconstructConfig().takes("any")
    assert not without("mid.*").takes("mid.conv")
    assert without("mid.*").takes("down.mid.conv")
    assert ReconstructConfig.from_dict(without("mid.*").to_dict()) == without("mid.*")
