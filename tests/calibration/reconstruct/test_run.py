"""Learned rounding on toys: better or unchanged, repeatable, a unit in memory at a time; what is left or refused."""

import dataclasses
import itertools
import weakref

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import (
    AttentionConfig,
    CalibrationError,
    ConfigError,
    LayerConfig,
    ModiffConfig,
    ModulationConfig,
    QuantizerConfig,
    StateError,
    WeightConfig,
    presets,
)
from modiff.calibration.data import CalibrationSet
from modiff.calibration.reconstruct import job as reconstruct_job
from modiff.calibration.reconstruct.layers import full_precision, without_states
from modiff.calibration.reconstruct.samples import UnitCall, UnitData
from modiff.hosts.names import BLOCK_CLASSES as DIFFUSERS
from modiff.model.calibrate import quantizers_of
from tests.calibration.learning import (
    QUICK,
    RESIDUAL,
    STATIC,
    STEPS,
    applied,
    codes_of,
    error_of,
    layers_of,
    learn,
    same_codes,
    static_config,
    weights,
    widened,
)
from tests.helpers import assert_same_bits, drifting
from tests.hosts.tiny import HOSTS
from tests.model.toys import sample, toy, toy_unet


@pytest.mark.parametrize(("unit", "rotation"), [("block", "none"), ("block", "hadamard"), ("layer", "none")])
def test_learned_rounding_lowers_the_loss_and_the_error_of_the_network(unit, rotation):
    model, calls = applied(toy_unet, weights(rotation=rotation))
    exact = sample(toy_unet(), seed=100)
    before, nearest = error_of(model, exact), codes_of(model)
    report = learn(model, calls, unit=unit)
    assert len(report.units) == (7 if unit == "block" else len(nearest))
    assert sum(u.after for u in report.units) < 0.75 * sum(u.before for u in report.units)
    if rotation == "none":  # a sum of losses says little about one noise; with this rotation it is the other way round
        assert error_of(model, exact) < before
    learned = {name for u in report.learned for name in u.layers}
    assert len(learned) > len(nearest) / 2
    for name, layer in layers_of(model).items():
        weight = layer.quantized_weight
        for (codes, _), was in zip(weight.codes(layer.weight), nearest[name], strict=True):
            assert ((codes - was).abs() <= 1).all()
        assert weight.fixed == (name in learned)


def test_before_and_after_are_the_losses_of_the_layers_as_they_are(monkeypatch):
    """Measured once more from outside: inputs of the quantized prefix, targets of full precision, rows held out."""
    seen: dict[str, tuple[list[UnitCall], UnitData]] = {}

    def spy(calls, run, **settings):
        seen[settings["name"]] = list(calls), UnitData(calls, run, **settings)
        return seen[settings["name"]][1]

    monkeypatch.setattr(reconstruct_job, "UnitData", spy)
    model, calls = applied(toy, weights())
    report = learn(model, calls)

    def losses() -> list[float]:
        values = []
        for name, (_, data) in seen.items():
            with without_states(model, "full_precision"), torch.no_grad():
                outputs = [(model.get_submodule(name)(*b.args, **b.kwargs), b) for b in data.held_batches(8)]
            axis = 1 if outputs[0][0].dim() == 4 else 2
            total = sum(float((o - b.targets[0]).square().sum(axis).mean()) * b.rows for o, b in outputs)
            values.append(total / sum(b.rows for _, b in outputs))
        return values

    assert [u.name for u in report.units] == ["body", "attention"]
    captured, inputs, targets = seen["attention"][0], [], []
    exact = toy()
    exact.attention.register_forward_hook(lambda _m, a, o: (inputs.append(a[0]), targets.append(o)) and None)
    with torch.no_grad():
        for call in calls:
            call.evaluate(exact)
    for visit, true, target in zip(captured, inputs, targets, strict=True):
        assert_same_bits(visit.targets[0], target)
        assert float((visit.args[0] - true).norm()) > 0.01 * float(true.norm()), "the inputs are of the quantized model"
    again, calls = applied(toy, weights())
    torch.manual_seed(1)  # the global state has no say
    assert learn(again, calls) == report
    assert same_codes(codes_of(again), codes_of(model))
    assert losses() == pytest.approx([u.after for u in report.units], rel=1e-4)
    for quantized in layers_of(model).values():
        quantized.quantized_weight.unfix()
    assert losses() == pytest.approx([u.before for u in report.units], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "iterations", "reason"),
    [
        ({}, {8}, "what was learned is no better on the rows held out"),
        ({"patience": 2}, {6}, "what was learned is no better on the rows held out"),
        ({"learning_rate": 50.0, "unit": "layer"}, {1, 2}, "what was learned is no better on the rows held out"),
        ({"iterations": 80, "regularizer": 100.0, "learning_rate": 0.3}, {70}, "every weight is decided"),
    ],
)
def test_a_unit_stops_after_checks_without_gain_in_the_second_half_or_with_every_weight_decided(
    settings, iterations, reason
):
    model, calls = applied(toy, weights())
    nearest = codes_of(model)
    still = {"iterations": 8, "learning_rate": 1e-6, "regularizer": 0.0, "checks": 8, "patience": 0}
    report = learn(model, calls, **still | settings)
    assert ({u.iterations for u in report.units}, {u.reason for u in report.units}) == (iterations, {reason})
    if "every" not in reason:  # rounding to nearest stays, to the bit
        assert all(not u.learned and u.after == u.before > 0 for u in report.units)
        assert same_codes(codes_of(model), nearest)
        assert not any(quantized.quantized_weight.fixed for quantized in layers_of(model).values())


@pytest.mark.parametrize("activations", ["full_precision", "quantized"])
def test_weights_of_modulated_layers_are_learned_without_their_states(activations):
    """Bits of the activation matter only where they are quantized while learning."""
    found = []
    for bits in (3, 8):
        model, calls = applied(toy, presets.published(4, bits))  # exact anchors leave less to learn
        exact = sample(toy(), seed=100)
        before = error_of(model, exact)
        report = learn(model, calls, activations=activations)
        assert report.learned
        assert bits == 3 or error_of(model, exact) < before
        found.append(codes_of(model))
    assert same_codes(*found) == (activations == "full_precision")


def test_nothing_else_of_the_model_changes():
    model, calls = applied(toy, weights())
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        learn(model, calls)
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.body._forward_hooks
    modiff.remove(model)
    for a, b in zip(sample(model.eval()), sample(toy()), strict=True):
        assert_same_bits(a, b)


def test_the_inputs_of_one_unit_at_a_time_are_in_memory(monkeypatch):
    model, calls = applied(toy, weights())
    alive: list[int] = []
    units: list[weakref.ref] = []

    def spy(visits, run, **settings):
        alive.append(sum(ref() is not None for ref in units))
        units.extend(weakref.ref(t) for v in visits for t in (*v.targets, *v.inputs()))
        return UnitData(visits, run, **settings)

    monkeypatch.setattr(reconstruct_job, "UnitData", spy)
    learn(model, calls, iterations=1, unit="layer")
    assert len(units) > 30
    assert alive == [0] * 5


class Odd(nn.Module):
    """A grouped convolution, two layers that share a residual, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.pair = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
        self.idle = nn.Conv2d(8, 8, 1)

    def forward(self, sample: Tensor) -> Tensor:
        h = self.conv(sample)
        return self.pair[0](h) + self.pair[1](h).tanh()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_layers_are_learned_in_float32_and_one_that_never_ran_is_left(dtype):
    torch.manual_seed(0)
    model = Odd().to(dtype)
    inputs = drifting(0, (8, 8, 4, 4), 6, 0.3, dtype)
    calls = modiff.collect(model, lambda _: [model(x) for x in inputs], progress=False)
    modiff.apply(model, dataclasses.replace(presets.tuned(3, 8), first_last="quantize", min_weights=1))
    *learned, idle = learn(model, calls, kinds=("Odd",)).units
    assert [u.layers for u in learned] == [("conv",), ("pair.0",), ("pair.1",)]
    assert all(u.learned for u in learned)
    assert (idle.name, idle.learned, idle.reason) == ("idle", False, "never ran on the calibration calls")
    layers = [layers_of(model)[u.name] for u in learned]
    assert {q.quantized_weight.codes(q.weight)[0][1].scale.dtype for q in layers} == {torch.float32}


def test_excluded_layers_keep_their_rounding_while_the_others_of_their_block_are_learned_and_the_digest_knows(tmp_path):
    model, calls = applied(toy, weights())
    nearest, left = codes_of(model), "attention.to_q"
    report = learn(model, calls, exclude=(left,))
    assert {n for unit in report.units for n in unit.layers} == set(nearest) - {left}
    codes = codes_of(model)
    assert same_codes({left: codes[left]}, {left: nearest[left]})
    assert any(not same_codes({n: codes[n]}, {n: nearest[n]}) for n in report.units[-1].layers)
    left = learn(model, calls).learned[0].layers[0]  # what was learned before stays
    before = codes_of(model)[left]
    learn(model, calls, exclude=(left,), folder=tmp_path)
    assert layers_of(model)[left].quantized_weight.fixed
    assert all(map(torch.equal, codes_of(model)[left], before))
    other, calls = applied(toy, weights())
    with pytest.raises(ConfigError, match="expected a folder of the same job"):
        learn(other, calls, exclude=(left,), folder=tmp_path)


def test_a_pattern_may_name_many_and_must_name_one_and_something_must_be_left():
    model, calls = applied(toy, weights())
    with pytest.raises(ConfigError, match=r"exclude: expected patterns that match a layer, got 'conv9'.* body,"):
        learn(model, calls, exclude=("body", "conv9"))
    with pytest.raises(ConfigError, match=r"expected layers to learn, got none\. All of them are excluded"):
        learn(model, calls, exclude=("*",))


DYNAMIC = r"got none\. Dynamic scales are measured at each call, and "
MODULATED = static_config(modulation=ModulationConfig())
LINEAR = static_config(modulation=ModulationConfig(predictor="linear"))
QUANTIZED = dataclasses.replace(QUICK, activations="quantized")
STEPWISE = ModiffConfig(
    layer=LayerConfig(
        weight=WeightConfig(bits=4), activation=dataclasses.replace(STATIC, step_groups=0), modulation=None
    )
)


@pytest.mark.parametrize(
    ("config", "learning", "error", "message"),
    [
        (presets.plain(None, 8), QUICK, ConfigError, r"expected layers to learn, got none\. No weight is quantized"),
        (presets.plain(4, 8), STEPS, ConfigError, DYNAMIC + "those of modulated"),
        (MODULATED, STEPS, ConfigError, DYNAMIC + "those of modulated"),
        (static_config(), RESIDUAL, ConfigError, DYNAMIC + "plain layers have"),
        (LINEAR, RESIDUAL, ConfigError, "body: expected predictor='hold' and one set of scales for all steps, got p"),
        (MODULATED, RESIDUAL, CalibrationError, "expected calls with the one before each, got none among 4"),
        (static_config(), STEPS, CalibrationError, "body: expected measured scales, got none"),
        (presets.modulated(4, 0), QUANTIZED, ConfigError, "body: expected 2 to 8 activation bits, got 0"),
        (STEPWISE, QUANTIZED, ConfigError, "body: expected one set of scales for all steps, got step_groups=0"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_the_reason(config, learning, error, message):
    model, calls = applied(toy, config, pairs=error is ConfigError)
    with pytest.raises(error, match=message):
        learn(model, calls, learning)
    if learning is QUANTIZED:
        assert learn(model, calls).learned


def test_a_plain_model_no_calls_and_a_running_trajectory_are_refused():
    model, calls = applied(toy, weights())
    with pytest.raises(StateError, match="reconstruct: expected a model with modulated layers, got a plain Toy"):
        learn(toy(), calls, QUICK)
    with pytest.raises(CalibrationError, match="reconstruct: expected at least one calibration call, got none"):
        learn(model, CalibrationSet([]), QUICK)
    with (
        modiff.trajectory(model),
        pytest.raises(StateError, match="reconstruct: expected no running trajectory, got one"),
    ):
        learn(model, calls)
    layers_of(model)["body"].pack()
    with pytest.raises(StateError, match="body: expected a weight with its floats, got a packed one"):
        learn(model, calls)


# ----------------------------------------------------------------------------------------------------- static scales


@pytest.mark.parametrize(("build", "symmetric"), [(toy, True), (toy_unet, False)])
def test_scales_that_are_far_too_wide_are_learned_down(build, symmetric):
    model, calls = applied(build, static_config(symmetric))
    start = widened(model, calls, 3.0)
    report = learn(model, calls, STEPS)
    assert sum(u.after for u in report.units) < 0.5 * sum(u.before for u in report.units)
    for unit in report.units:
        for name in unit.layers:
            quantizer = layers_of(model)[name].quantizer
            assert unit.learned == (quantizer.static is not start[name])
            for now, was in zip(quantizer.static, start[name], strict=True):
                assert now.scale.shape == was.scale.shape
                if not symmetric:
                    assert torch.equal(now.zero_point, was.zero_point)
    moved = [float(t.quantizer.static[-1].scale / start[n][-1].scale) for n, t in layers_of(model).items()]
    assert sum(m < 0.8 for m in moved) > len(moved) / 2
    right = {name: quantized.quantizer.static for name, quantized in layers_of(model).items()}
    learned = {
        n for u in learn(model, calls, STEPS, learning_rate=20.0, iterations=2, checks=2).learned for n in u.layers
    }
    assert {n for n in right if layers_of(model)[n].quantizer.static is not right[n]} == learned


def test_scales_of_attention_are_learned_with_their_block():
    pipe = HOSTS["ddpm"].build()
    calls = modiff.collect(pipe, lambda _: HOSTS["ddpm"].call(pipe, steps=2, batch=4), progress=False)
    attention = AttentionConfig(
        operands=STATIC, softmax=QuantizerConfig(bits=8, symmetric=False, lowest="zero", dynamic=False)
    )
    config = dataclasses.replace(static_config(), attention=attention, include=("*mid_block.attentions*",))
    modiff.apply(pipe, config)
    modiff.calibrate(pipe, lambda: HOSTS["ddpm"].call(pipe, steps=2, batch=4))
    before = {name: quantizer.static for name, quantizer in quantizers_of(pipe.unet).items()}
    report = learn(pipe.unet, calls, STEPS, kinds=DIFFUSERS)
    assert report.units[0].name == "mid_block.attentions.0"
    assert report.units[0].ratio < 0.95
    assert len(report.units) == 4
    assert {u.reason for u in report.units[1:]} == {"lies in no block: the scales of its products stay as measured"}
    for name, quantizer in quantizers_of(pipe.unet).items():
        inside = name.startswith("mid_block.attentions.0.")
        assert (quantizer.static is not before[name]) == inside
        assert not inside or not torch.equal(quantizer.static[0].scale, before[name][0].scale)


def test_the_loss_of_residual_scales_is_that_of_the_layer_run_on_both_inputs():
    """The loss before learning, against the modulated layer itself: two steps of a trajectory, p = 2.4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    inputs = drifting(0, (6, 16), 2, 0.3, torch.float32)
    calls = modiff.collect(model, lambda _: [model(x) for x in inputs], pairs=True, progress=False)
    modiff.apply(model, dataclasses.replace(static_config(modulation=ModulationConfig()), first_last="quantize"))
    modiff.calibrate(model, lambda: modiff.replay(model, calls))
    report = learn(model, calls, RESIDUAL, held_out=0.5)
    layers_of(model)["0"].quantizer.static = None
    again = learn(model, calls, RESIDUAL, held_out=0.5)
    assert again.units[0].before == pytest.approx(report.units[0].before, rel=1e-5), "min-max is where both start"
    modiff.calibrate(model, lambda: modiff.replay(model, calls))
    with modiff.trajectory(model), torch.no_grad():
        outputs = [model(x) for x in inputs]
    with full_precision(model), torch.no_grad():
        losses = (outputs[1] - model(inputs[1])).abs().pow(2.4).sum(-1)
    means = [float(losses[list(rows)].mean()) for rows in itertools.combinations(range(6), 3)]
    assert min(abs(m / report.units[0].before - 1) for m in means) < 1e-4
