"""Losses of layers inside a block, QDrop, and rounding learned together with scales."""

import dataclasses

import pytest
import torch

import modiff
from modiff import ConfigError
from modiff.calibration.reconstruct import job
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.reconstruct.layers import Trainee, full_precision
from tests.calibration.learning import QUICK, applied, codes_of, layers_of, learn, same_codes, static_config
from tests.calibration.learning import weights as weights_only
from tests.model.toys import toy

JOINT = dataclasses.replace(
    QUICK, learn="weights_and_scales", activations="quantized", regularizer=0.0, scale_rate=0.01, iterations=60
)


def with_weights(config):
    layer = dataclasses.replace(config.layer, weight=modiff.WeightConfig(bits=3))
    return dataclasses.replace(config, layer=layer)


def measured():
    model, calls = applied(toy, with_weights(static_config(symmetric=False)))
    modiff.calibrate(model, lambda: modiff.replay(model, calls))
    return model, calls


def test_the_loss_is_that_of_the_block_and_w_times_that_of_its_layers_but_the_last(monkeypatch):
    """Targets from the inputs of full precision, outputs from those of the quantized model; written out in float64."""
    checked = []

    def spy(block, run, data, learner, config, generator, objective):
        learner.groups()
        batch = data.batch(data.training[:4])
        unit, seen = model.get_submodule(block.name), []
        hooks = [layers_of(model)[n].register_forward_hook(lambda _m, _i, o: seen.append(o)) for n in block.layers]
        whole = unit(*batch.args, **batch.kwargs)
        outputs = [*seen, whole]
        seen.clear()
        with full_precision(model), torch.no_grad():
            unit(*batch.exact[0], **batch.exact[1])
        targets = [*seen, batch.targets[0]]
        for hook in hooks:
            hook.remove()
        losses = [(o.detach().double() - t.double()).square() for o, t in zip(outputs, targets, strict=True)]
        *inner, _, block_loss = [float(e.sum(1 if e.dim() == 4 else -1).mean()) for e in losses]
        assert (sum(inner) > 0) == (len(block.layers) > 1)
        assert float(objective(batch).detach()) == pytest.approx(block_loss + 0.5 * sum(inner), rel=1e-5)
        checked.append(block.name)
        return real(block, run, data, learner, config, generator, objective)

    real = job.learn
    monkeypatch.setattr(job, "learn", spy)
    model, calls = applied(toy, weights_only())
    report = learn(model, calls, layer_weight=0.5, iterations=4)
    assert checked == ["body", "attention"] == [unit.name for unit in report.units]


def test_layer_losses_change_what_is_learned_and_weight_0_is_plain_reconstruction_to_the_bit():
    codes = []
    for weight in (0.0, 4.0):
        model, calls = applied(toy, weights_only())
        learn(model, calls, layer_weight=weight)
        codes.append(codes_of(model))
    model, calls = applied(toy, weights_only())
    learn(model, calls)
    assert same_codes(codes_of(model), codes[0])
    assert not same_codes(codes_of(model), codes[1])


def test_values_are_dropped_with_the_probability_and_only_in_the_loss_that_is_learned(monkeypatch):
    shares = []
    real = Trainee._dropped

    def spy(self, value):
        kept = real(self, value)
        shares.append(float(kept.float().mean()))
        assert torch.is_grad_enabled()
        return kept

    monkeypatch.setattr(Trainee, "_dropped", spy)
    model, calls = measured()
    first = learn(model, calls, JOINT, qdrop=0.25, iterations=8)
    assert abs(sum(shares) / len(shares) - 0.25) < 0.01
    again, calls = measured()
    torch.manual_seed(5)  # the global state has no say
    assert learn(again, calls, JOINT, qdrop=0.25, iterations=8) == first
    shares.clear()
    learn(*measured(), JOINT, iterations=2)
    assert shares == []


def test_rounding_and_scales_of_a_block_are_learned_together_and_reported_before_h_is_cut():
    model, calls = measured()
    scales = {name: layer.quantizer.static for name, layer in layers_of(model).items()}
    nearest = codes_of(model)
    report = learn(model, calls, JOINT)
    assert report.learned
    assert sum(u.after for u in report.units) < 0.9 * sum(u.before for u in report.units)
    for unit in report.learned:
        assert 0 <= unit.figures["undecided"] <= 1
        assert unit.figures["soft"] > 0
        for name in unit.layers:
            assert not torch.equal(scales[name][0].scale, layers_of(model)[name].quantizer.static[0].scale)
        assert all(layers_of(model)[name].quantized_weight.fixed for name in unit.layers)
    assert not same_codes(codes_of(model), nearest)
    drawn = learn(*measured(), JOINT, learning_rate=1e-6, scale_rate=1e-6, iterations=1)
    assert not drawn.learned or drawn.units[0].figures["undecided"] > 0.5, "h starts where rounding cuts it"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learn": "weights_and_scales"}, "activations: expected 'quantized' for weights_and_scales"),
        ({"qdrop": 0.5}, r"qdrop: expected 0, or a probability in \(0, 1\) with activations='quantized'"),
        ({"layer_weight": -1.0}, "layer_weight: expected 0 or more"),
        ({"layer_weight": 1.0, "unit": "layer"}, "layer_weight: expected 0 without rounding to learn in blocks"),
        ({"scale_rate": 0.0}, "scale_rate: expected a positive number"),
    ],
)
def test_settings_of_blocks_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReconstructConfig(**settings)
