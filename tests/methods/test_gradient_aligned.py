"""Gradient-Aligned Calibration: TFMQ-DM with samples weighed; at outer rate 0 the same bits."""

import pytest
import torch

from modiff import ConfigError, ModulationConfig
from modiff.calibration.reconstruct.config import AlignmentConfig, ReconstructConfig
from modiff.methods import GradientAlignedConfig, TfmqDmConfig, quantize
from tests.methods import small

LEARNING = ReconstructConfig(held_out=0.5, iterations=8, batch=4, learning_rate=0.1, checks=2, patience=0)
SMALL = {"steps": 4, "groups": 4, "samples": 4, "batch": 4, "reconstruction": LEARNING, "temporal": LEARNING}


def outcome(config):
    pipe = small.build()
    report = quantize(pipe, config, progress=False)
    return report.weights.units, small.call(pipe, steps=4)


def test_at_outer_rate_0_it_is_tfmq_dm_to_the_bit_and_reports_validation_and_cosine():
    base, image = outcome(TfmqDmConfig(**SMALL))
    still, same = outcome(GradientAlignedConfig(**SMALL, alignment=AlignmentConfig(outer_rate=0.0)))
    aligned, other = outcome(GradientAlignedConfig(**SMALL, alignment=AlignmentConfig(outer_rate=0.5)))
    assert torch.equal(image, same)
    assert not torch.equal(image, other)
    assert [u.after for u in base] == [u.after for u in still]
    names = {f"{what}_{weights}" for what in ("validation", "cosine") for weights in ("uniform", "learned")}
    figures = [u.figures for u in aligned if u.kind != "TemporalBlock" and names <= u.figures.keys()]
    assert len(figures) > 3
    assert all(-1 <= f["cosine_learned"] <= 1 and f["validation_learned"] > 0 for f in figures)
    assert any(f["validation_learned"] != f["validation_uniform"] for f in figures)


def test_modulated_layers_are_learned_alike_and_rounding_to_nearest_is_refused():
    pipe = small.build()
    report = quantize(pipe, GradientAlignedConfig(**SMALL, modulation=ModulationConfig()), progress=False)
    assert "W4A8 modulated" in {entry.setting for entry in report.taken}
    assert any("cosine_learned" in unit.figures for unit in report.weights.units)
    with pytest.raises(ConfigError, match=r"reconstruction: expected settings of reconstruction, got None"):
        GradientAlignedConfig(**SMALL | {"reconstruction": None})
