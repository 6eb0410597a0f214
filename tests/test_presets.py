"""Presets say what their names say."""

from __future__ import annotations

import pytest

from modiff import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig, presets

SHORT = {"w8a8": (8, 8), "w8a4": (8, 4), "w8a3": (8, 3), "w4a8": (4, 8), "w4a4": (4, 4)}


@pytest.mark.parametrize("name", SHORT)
def test_a_short_name_is_the_published_method_at_its_bits(name):
    weight, activation = SHORT[name]
    assert getattr(presets, name)() == presets.modulated(weight, activation)


def test_the_short_names_are_all_there_are():
    assert {n for n in vars(presets) if n[0] == "w" and n[1].isdigit()} == set(SHORT)


@pytest.mark.parametrize("bits", [(8, 4), (None, 3), (4, None)])
def test_the_families_differ_in_one_setting_from_one_to_the_next(bits):
    weight, activation = WeightConfig(bits=bits[0]), QuantizerConfig(bits=bits[1])
    settings = {
        presets.modulated: ModulationConfig(),
        presets.plain: None,
        presets.published: ModulationConfig(anchor_weights="quantized"),
        presets.uncompensated: ModulationConfig(error_compensation="none", anchor_weights="quantized"),
    }
    for preset, modulation in settings.items():
        layer = LayerConfig(weight=weight, activation=activation, modulation=modulation)
        assert preset(*bits) == ModiffConfig(layer=layer)


def test_the_published_method_holds_starts_exactly_and_clips_nothing():
    layer = presets.published().layer
    assert layer.modulation == ModulationConfig(
        predictor="hold",
        error_compensation="closed_loop",
        first_step="full_precision",
        anchor_weights="quantized",
        reanchor_every=0,
    )
    assert (layer.activation.clip, layer.activation.dynamic, layer.rotation) == (1.0, True, "none")


@pytest.mark.parametrize(
    ("bits", "clip", "predictor"),
    [(8, 1.0, "linear"), (5, 1.0, "linear"), (4, 0.8, "linear"), (3, 0.6, "linear"), (2, 0.45, "hold")],
)
def test_the_tuned_settings_clip_more_at_fewer_bits_and_predict_where_it_is_stable(bits, clip, predictor):
    layer = presets.tuned(None, bits).layer
    assert (layer.activation.bits, layer.activation.clip) == (bits, clip)
    assert (layer.modulation.predictor, layer.rotation) == (predictor, "hadamard")
    assert layer.weight.bits is None
    assert predictor == "hold" or layer.modulation.gain == 0.8
