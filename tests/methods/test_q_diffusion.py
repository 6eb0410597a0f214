"""Q-Diffusion: all layers and the attention products quantized, rounding and scales learned, never worse than begun."""

import dataclasses

import pytest
import torch

from modiff import ConfigError, ModulationConfig
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.hosts.names import shortcut_splits
from modiff.methods import QDiffusionConfig, quantize
from modiff.model.attach import attachment_of
from modiff.model.calibrate import quantizers_of
from tests.methods import small
from tests.reference.quantizer import affine_parameters

STEPS = 4
ROUNDS = ReconstructConfig(iterations=8, batch=4, learning_rate=0.1, checks=2, patience=0)
LEARNS = dataclasses.replace(ReconstructConfig.quick_activation_scales(), iterations=8, batch=4, checks=2)
SMALL = QDiffusionConfig(
    activation_bits=4, steps=STEPS, groups=2, samples=4, batch=4, reconstruction=ROUNDS, learning=LEARNS
)
MEASURED = dataclasses.replace(SMALL, rounding="nearest", scales="measured")


@pytest.fixture(scope="module")
def outcome():
    pipe = small.build()
    return pipe, quantize(pipe, SMALL, progress=False)


def test_no_layer_is_exempt_each_half_of_a_shortcut_has_a_scale_and_softmax_starts_at_zero_with_8_bits(outcome):
    pipe, report = outcome
    assert {e.setting for e in report.entries} == {"W4A4 plain"}
    quantizers, splits = quantizers_of(pipe.unet), shortcut_splits(pipe.unet)
    assert splits
    for name, quantized in attachment_of(pipe.unet).layers.items():
        assert len(quantizers[name].static) == (2 if name in splits else 1)
        assert all(q.scale.numel() == 1 and q.zero_point is not None for q in quantizers[name].static)
        assert quantized.quantized_weight.fixed
    products = {n: quantizers[f"mid_block.attentions.0.{n}"] for n in ("q", "k", "v", "softmax")}
    assert [quantizer.bits for quantizer in products.values()] == [4, 4, 4, 8]
    ((scale, zero_point),) = products["softmax"].static
    assert int(zero_point) == -128, "no code below zero"
    assert 0 < float(scale) <= 1.01 / 255


def test_a_unit_is_never_worse_than_it_was_and_some_are_better(outcome):
    _, report = outcome
    for learned in (report.weights, report.scales):
        assert all(u.after <= u.before for u in learned.units)
        assert any(u.after < u.before for u in learned.units)
    assert {u.kind for u in report.weights.units} >= {"ResnetBlock2D", "Attention"}
    values = report.to_dict()
    assert len(values["weights"]) == len(report.weights.units)
    assert "Static scales: " in str(report)


def test_measured_ranges_are_those_of_the_kept_states_in_full_precision():
    """conv_in is the first layer, so what it reads in the quantized network are the states themselves."""
    pipe = small.build()
    states = small.states_of(pipe, steps=STEPS, batch=4)
    quantize(pipe, MEASURED, progress=False)
    kept = torch.cat([states[0], states[2]])  # every T / groups = 2 steps
    exact = affine_parameters([float(kept.min()), float(kept.max())], 4, False, 1.0)
    ((scale, zero_point),) = quantizers_of(pipe.unet)["conv_in"].static
    assert (float(scale), int(zero_point)) == (pytest.approx(exact[0], rel=1e-5), exact[1])


def test_with_modulation_scales_of_residuals_are_learned_and_attention_stays_measured():
    pipe = small.build()
    report = quantize(pipe, dataclasses.replace(SMALL, modulation=ModulationConfig()), progress=False)
    assert {e.setting for e in report.taken} == {"W4A4 modulated"}
    assert {u.name for u in report.scales.units} == set(attachment_of(pipe.unet).layers)
    assert all(u.after <= u.before for u in report.scales.units)
    assert quantizers_of(pipe.unet)["mid_block.attentions.0.softmax"].static is not None
    assert torch.isfinite(small.call(pipe, steps=STEPS)).all()
    with pytest.raises(ConfigError, match=r"groups: expected 2 or more with modulation, got 1\. The first group is of"):
        dataclasses.replace(SMALL, modulation=ModulationConfig(), groups=1)


def test_attention_is_left_alone_where_the_settings_or_its_bits_say_so():
    unet = small.build().unet
    for changes in ({"activation_bits": None}, {"attention": "full_precision"}):
        assert dataclasses.replace(MEASURED, **changes).model_config(unet).attention is None
