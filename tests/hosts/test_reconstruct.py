"""Reconstruction inside real networks: outputs that are tuples, contexts of guidance, named blocks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import modiff
from modiff import ConfigError, StateError, presets
from modiff.api import reconstruct
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.model.attach import attachment_of
from tests.hosts.tiny import HOSTS

QUICK = ReconstructConfig(iterations=8, batch=4, learning_rate=0.2, checks=2)


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_no_unit_of_a_host_gets_worse_and_some_get_better(name):
    host = HOSTS[name]
    pipe = host.build()
    modiff.apply(pipe, presets.modulated(4, 8))
    report = reconstruct(pipe, lambda i: host.call(pipe, steps=3, seed=i, batch=2), QUICK, progress=False)
    assert all(math.isfinite(u.before) and u.after <= u.before for u in report.units)
    assert report.learned
    layers = attachment_of(host.network(pipe)).layers
    kept = {layer for unit in report.learned for layer in unit.layers}
    assert {name for name, quantized in layers.items() if quantized.quantized_weight.fixed} == kept
    assert torch.isfinite(host.call(pipe)).all()


def test_a_set_can_be_collected_before_and_blocks_named_by_the_user():
    host = HOSTS["ddpm"]
    pipe = host.build()
    calls = modiff.collect(pipe, lambda i: host.call(pipe, steps=2, seed=i, batch=2), progress=False)
    exact = host.call(pipe)
    modiff.apply(pipe, presets.plain(3, 8))
    before = float((host.call(pipe) - exact).norm())
    names = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    config = dataclasses.replace(QUICK, blocks=("down_blocks.?", "mid_block", "up_blocks.?"))
    report = reconstruct(pipe, calls, config, progress=False)
    assert [u.name for u in report.units] == names
    assert report.learned
    assert sum(u.after for u in report.units) < sum(u.before for u in report.units)
    assert float((host.call(pipe) - exact).norm()) < before
    modiff.remove(pipe)
    assert torch.equal(host.call(pipe), exact)


def test_what_is_no_denoiser_or_carries_no_modiff_is_refused():
    host = HOSTS["ddpm"]
    pipe = host.build()
    with pytest.raises(StateError, match="reconstruct: expected a model with modulated layers, got a plain UNet2D"):
        reconstruct(pipe, lambda i: host.call(pipe), QUICK, progress=False)
    with pytest.raises(ConfigError, match=r"reconstruct\.component: expected one of unet, got 'vae'"):
        reconstruct(pipe, [], QUICK, component="vae", progress=False)
