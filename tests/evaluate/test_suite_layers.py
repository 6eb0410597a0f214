"""Which configuration's layers are shown, and that they are watched without changing the model."""

from __future__ import annotations

import dataclasses

import torch

from modiff import presets
from modiff.config import ModiffConfig
from modiff.evaluate.suite_images import PipelineSource
from modiff.evaluate.suite_layers import layer_errors, watched_plan
from modiff.evaluate.suite_plans import Plan
from tests.pixels import pixel_pipeline


def static(config: ModiffConfig) -> ModiffConfig:
    activation = dataclasses.replace(config.layer.activation, dynamic=False, granularity="tensor")
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, activation=activation))


FULL = Plan(name="full", steps=4)
PLAIN = Plan(name="plain", steps=4, config=presets.plain(8, 4))
MODULATED = Plan(name="modulated", steps=4, config=presets.modulated(8, 4))
STATIC = Plan(name="static", steps=4, config=static(presets.modulated(8, 4)))


def test_the_last_modulated_configuration_with_dynamic_scales_is_shown() -> None:
    assert watched_plan([FULL, MODULATED, PLAIN, STATIC]) == MODULATED
    assert watched_plan([FULL, PLAIN, STATIC]) == PLAIN
    assert watched_plan([FULL, STATIC]) is None


def test_a_static_override_counts_as_static() -> None:
    config = dataclasses.replace(presets.w8a4(), overrides=(("*conv*", static(presets.w8a4()).layer),))
    assert watched_plan([Plan(name="mixed", steps=4, config=config)]) is None


def test_every_layer_has_its_error_at_every_step() -> None:
    source = PipelineSource(pixel_pipeline())
    unet = source.pipe.unet
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    traces = layer_errors(source, MODULATED, num_images=2)
    assert len(traces) > 10
    assert all([step["step"] for step in trace["steps"]] == [0, 1, 2, 3] for trace in traces)
    assert max(step["output_relative_l2"] for trace in traces for step in trace["steps"]) > 0.001
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert layer_errors(source, FULL) == []
