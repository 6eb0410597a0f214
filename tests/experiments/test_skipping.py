"""Silence by a threshold: the law holds, an independent loop agrees, and operations are counted as they run."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import modiff
from experiments.skipping import SkipRule, Tally, Unit, full_precision_first_step, skip_below
from modiff import presets
from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.errors import ConfigError, StateError
from modiff.model.attach import required_attachment
from modiff.nn import ModulatedLayer
from modiff.nn.operator import LayerOperator
from tests.helpers import assert_same_bits, assert_within, drifting
from tests.recipes import randomised, state_of
from tests.reference import layers

PLAIN = dataclasses.replace(presets.plain(None, 3), include=("0",))
STEPS = 7
LINEAR, CONV = (3, 5, 16), (3, 16, 6, 6)
UNITS: tuple[Unit, ...] = ("layer", "sample", "token")


def network(shape: Sequence[int]) -> nn.Sequential:
    layer = nn.Linear(16, 8) if len(shape) == 3 else nn.Conv2d(16, 8, 3, padding=1)
    return nn.Sequential(randomised(layer)).double()


def config(bits: int = 0, predictor: str = "hold", **quantizer: object) -> ModiffConfig:
    layer = LayerConfig(
        weight=WeightConfig(bits=None),
        activation=QuantizerConfig(bits=bits, **quantizer),
        modulation=ModulationConfig(state_dtype="float64", predictor=predictor, gain=0.8),
    )
    return ModiffConfig(layer=layer, include=("0",))


@contextmanager
def silent(model: nn.Sequential, settings: ModiffConfig, rule: SkipRule) -> Iterator[tuple[ModulatedLayer, Tally]]:
    modiff.apply(model, settings)
    tally = skip_below(model, rule)
    with torch.no_grad(), modiff.trajectory(model):
        yield required_attachment(model, "test").layers["0"], tally


def by_hand(inputs: Sequence[Tensor], unit: Unit, threshold: float, gain: float) -> tuple[list[Tensor], list[Tensor]]:
    """Input states and masks of what was sent, one for each step after the first."""
    states, masks = [inputs[0]], []
    move = torch.zeros_like(inputs[0]) if gain else None
    channel = inputs[0].dim() - 1 if inputs[0].dim() == 3 else 1
    for step, x in enumerate(inputs[1:]):
        guess = states[-1] if move is None or step == 0 else states[-1] + gain * move
        r = x - guess
        mask = torch.zeros_like(x)
        if unit == "layer":
            mask[:] = float(r.norm() > threshold * x.norm())
        for i in range(len(x)):
            if unit == "sample":
                mask[i] = float(r[i].norm() > threshold * x[i].norm())
            if unit == "token":
                tokens, values = (t[i].movedim(channel - 1, -1).reshape(-1, 16) for t in (r, x))
                size = math.sqrt(sum(float(v @ v) for v in values) / len(values))
                kept = torch.tensor([float(t.norm() > threshold * size) for t in tokens], dtype=x.dtype)
                mask[i] = kept.reshape([1 if d == channel - 1 else n for d, n in enumerate(x.shape[1:])])
        masks.append(mask)
        state = guess + mask * r
        move = state - states[-1] if gain else None
        states.append(state)
    return states, masks


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("shape", "predictor"), [(LINEAR, "linear"), (CONV, "hold")], ids=["linear", "conv"])
def test_states_and_counts_follow_an_independent_loop_and_the_law_holds(shape, unit, predictor):
    inputs, model = drifting(4, shape, STEPS, 0.1), network(shape)
    original = model[0]
    states, masks = by_hand(inputs, unit, 0.13, 0.8 if predictor == "linear" else 0.0)
    assert 0.2 < torch.stack(masks).mean() < 0.9  # some are sent, some are not
    states_seen: list[Tensor] = []
    with silent(model, config(predictor=predictor), SkipRule(unit=unit, threshold=0.13)) as (quantized, tally):
        for x in inputs:
            out = model(x)
            states_seen.append(state_of(quantized).input.clone())
            expected = original(state_of(quantized).input)
            assert_within(out, expected, 1e-9)
            assert_within(state_of(quantized).output, expected, 1e-9)
    for state, exact in zip(states_seen, states, strict=True):
        assert_within(state, exact, 1e-9)
    starts, sent = tally.shares("0")
    assert starts == pytest.approx(1 / STEPS)
    assert sent == pytest.approx(float(torch.stack(masks).mean()) * (STEPS - 1) / STEPS, rel=1e-9)


def test_a_silent_layer_does_not_run_its_operator(monkeypatch):
    inputs, model = drifting(4, LINEAR, STEPS, 0.1), network(LINEAR)
    with silent(model, config(), SkipRule(unit="layer", threshold=0.13)) as (_, tally):
        calls: list[int] = []
        for name in ("anchor", "linear"):
            method = getattr(LayerOperator, name)
            monkeypatch.setattr(LayerOperator, name, lambda *a, m=method: (calls.append(1), m(*a))[1])
        for x in inputs:
            model(x)
    assert 1 < len(calls) < STEPS
    starts, sent = tally.shares("0")
    assert len(calls) == round((starts + sent) * STEPS)


def test_codes_are_those_of_the_library_where_all_is_sent_and_of_what_is_sent_elsewhere():
    inputs = drifting(2, LINEAR, STEPS, 0.1, torch.float32)
    coded = config(bits=4, granularity="sample")
    plain = network(LINEAR).float()
    modiff.apply(plain, coded)
    with torch.no_grad(), modiff.trajectory(plain):
        expected = [plain(x).clone() for x in inputs]
    model = network(LINEAR).float()
    with silent(model, coded, SkipRule(unit="token", threshold=0.0)) as (_, tally):
        for x, exact in zip(inputs, expected, strict=True):
            assert_same_bits(model(x), exact)
    assert tally.shares("0")[1] == pytest.approx((STEPS - 1) / STEPS)
    rare = network(LINEAR).float()
    with silent(rare, coded, SkipRule(unit="token", threshold=0.13)) as (quantized, tally):
        for x in inputs:
            out = rare(x)
            weight, bias = quantized.weight.detach(), quantized.bias.detach()
            assert_within(out.double(), layers.linear(state_of(quantized).input.double(), weight, bias), 2e-5)
    assert 0.1 < tally.shares("0")[1] < 0.8


def test_the_first_step_is_exact_and_the_others_are_plain():
    inputs = drifting(0, (2, 16), 3, 0.3, torch.float32)
    layer = randomised(nn.Linear(16, 8))
    plain, warm = nn.Sequential(layer), nn.Sequential(layer)
    for model in (plain, warm):
        modiff.apply(model, PLAIN)
    full_precision_first_step(warm)
    with torch.no_grad():
        for _ in range(2):
            with modiff.trajectory(warm), modiff.trajectory(plain):
                assert_same_bits(warm(inputs[0]), layer(inputs[0]))
                assert not torch.equal(plain(inputs[0]), layer(inputs[0]))
                for x in inputs[1:]:
                    assert_same_bits(warm(x), plain(x))
        assert_same_bits(warm(inputs[0]), plain(inputs[0]))  # no trajectory, no first step


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (lambda model: skip_below(model, SkipRule(unit="layer", threshold=0.1)), PLAIN),
        (lambda model: skip_below(model, SkipRule(unit="layer", threshold=0.1)), config(bits=4, dynamic=False)),
        (full_precision_first_step, config()),
    ],
)
def test_layers_and_models_that_they_do_not_fit_are_refused_and_left(change, settings):
    model = network(LINEAR)
    with pytest.raises(StateError, match="plain Sequential"):
        change(model)
    modiff.apply(model, settings)
    inputs = required_attachment(model, "test").layers["0"].inputs
    with pytest.raises(ConfigError, match=r"expected a (modulated layer with dynamic scales|plainly quantized layer)"):
        change(model)
    assert required_attachment(model, "test").layers["0"].inputs is inputs
