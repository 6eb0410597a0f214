"""MoDiff's three kinds: dynamic scales, ranges of residuals, learned scales that are never worse than they began."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import modiff
from modiff import ConfigError, ModulationConfig
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.hosts.names import shortcut_splits
from modiff.methods import ModiffMethodConfig, quantize
from modiff.model.calibrate import quantizers_of
from tests.helpers import assert_same_bits
from tests.methods import small
from tests.methods.test_q_diffusion import LEARNS, ROUNDS

STEPS, GROUPS, BATCH = 6, 3, 2
SMALL = ModiffMethodConfig(
    activation_bits=4, steps=STEPS, groups=GROUPS, samples=BATCH, batch=BATCH, rounding="nearest",
    reconstruction=ROUNDS, learning=LEARNS,
)  # fmt: skip
MINMAX = dataclasses.replace(SMALL, kind="static_minmax")
LEARNED = dataclasses.replace(SMALL, kind="static_learned")


def inputs_of_each_step() -> dict[str, list[Tensor]]:
    """What every layer of the full-precision network reads, step by step, float64."""
    pipe = small.build()
    found: dict[str, list[Tensor]] = {}
    for name, module in pipe.unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, args, name=name: found.setdefault(name, []).append(args[0].detach().double().clone())
            )
    small.call(pipe, steps=STEPS, batch=BATCH)
    return found


@pytest.fixture(scope="module")
def residuals() -> dict[str, list[Tensor]]:
    """a_t - a_{t+1} of the kept steps; every T / groups = 2 steps, without the first."""
    return {n: [a[s] - a[s - 1] for s in (2, 4)] for n, a in inputs_of_each_step().items()}


def parts(name: str, tensors: list[Tensor], splits: dict[str, int]) -> list[list[Tensor]]:
    if name not in splits:
        return [tensors]
    return [[t[:, : splits[name]] for t in tensors], [t[:, splits[name] :] for t in tensors]]


@pytest.mark.parametrize("bits", [2, 4])
def test_symmetric_scales_cover_the_largest_residual_of_each_half(residuals, bits):
    pipe = small.build()
    quantize(pipe, dataclasses.replace(MINMAX, activation_bits=bits), progress=False)
    splits, quantizers = shortcut_splits(pipe.unet), quantizers_of(pipe.unet)
    assert set(quantizers) == set(residuals)
    assert splits
    for name, tensors in residuals.items():
        expected = [max(float(r.abs().max()) for r in part) for part in parts(name, tensors, splits)]
        scales = [float(q.scale) for q in quantizers[name].static]
        assert scales == pytest.approx([e / (2 ** (bits - 1) - 1) for e in expected], rel=1e-4)


def test_learned_scales_start_at_the_ranges_and_no_layer_is_worse():
    measured, learned = small.build(), small.build()
    quantize(measured, MINMAX, progress=False)
    report = quantize(learned, LEARNED, progress=False)
    assert {u.name for u in report.scales.units} == set(quantizers_of(learned.unet))
    assert all(u.after <= u.before for u in report.scales.units)
    kept = {u.name for u in report.scales.units if u.learned}
    assert kept
    for name, quantizer in quantizers_of(learned.unet).items():
        start = quantizers_of(measured.unet)[name].static
        same = all(torch.equal(a.scale, b.scale) for a, b in zip(quantizer.static, start, strict=True))
        assert same == (name not in kept)


def test_a_learned_layer_s_loss_is_its_output_error_on_pairs_in_float64(residuals):
    """conv_out at 2 bits: the loss reported before learning, for all rows, from the formulas of section 1.5."""
    pipe = small.build()
    layer = pipe.unet.conv_out
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    quick = dataclasses.replace(LEARNS, held_out=0.75, iterations=1)
    config = dataclasses.replace(LEARNED, activation_bits=2, weight_bits=None, learning=quick)
    report = quantize(pipe, config, progress=False)
    unit = next(u for u in report.scales.units if u.name == "conv_out")
    scale = max(float(r.abs().max()) for r in residuals["conv_out"])  # qmax is 1 at 2 bits
    inputs = inputs_of_each_step()["conv_out"]
    losses = []
    for step in (2, 4):
        before, now = inputs[step - 1], inputs[step]
        coded = before + scale * ((now - before) / scale).round().clamp(-2, 1)
        outputs = [torch.nn.functional.conv2d(x, weight, bias, padding=1) for x in (coded, now)]
        losses += [float(d) for d in (outputs[0] - outputs[1]).abs().pow(2.4).sum(1).flatten(1).mean(1)]
    # 3 of the 4 rows are held out, which ones the seed decides
    triples = [sum(losses[:i] + losses[i + 1 :]) / 3 for i in range(4)]
    assert min(abs(unit.before / t - 1) for t in triples) < 1e-3


def test_dynamic_scales_with_rounding_to_nearest_need_no_trajectory():
    pipe = small.build()

    def never(index: int) -> object:
        raise AssertionError("nothing is to be calibrated")

    plain = small.call(pipe, steps=STEPS)
    report = quantize(pipe, SMALL, run=never, progress=False)
    assert {e.setting for e in report.entries} == {"W8A4 modulated"}
    assert (report.weights, report.scales) == (None, None)
    coded = small.call(pipe, steps=STEPS)
    assert 0 < float((coded - plain).norm() / plain.norm()) < 0.1
    modiff.remove(pipe)
    assert_same_bits(small.call(pipe, steps=STEPS), plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_bits": 1}, r"ModiffMethodConfig\.activation_bits: expected None or 2 to 8, got 1"),
        ({"kind": "static_learned", "activation_bits": None}, r"activation_bits: expected 2 to 8 with kind='static_le"),
        (
            {"kind": "static_minmax", "modulation": ModulationConfig(predictor="linear")},
            r"modulation: expected predictor='hold' with kind='static_minmax'",
        ),
        ({"step_groups": -1}, r"ModiffMethodConfig\.step_groups: expected 0 or more groups, got -1"),
        ({"learning": ReconstructConfig()}, r"ModiffMethodConfig\.learning\.learn: expected 'activation_scales'"),
        (
            {"activation_bits": 3, "modulation": ModulationConfig(predictor="linear")},
            r"LayerConfig\.modulation\.predictor: expected 'hold' at 3 bits",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModiffMethodConfig(**settings)


STEPWISE = dataclasses.replace(SMALL, kind="static_steps", step_groups=2)


def assert_same_scales(ours, theirs) -> None:
    expected = quantizers_of(theirs.unet)
    for name, quantizer in quantizers_of(ours.unet).items():
        tensors = quantizer.state_dict_tensors()
        assert set(tensors) == set(expected[name].state_dict_tensors())
        for key, tensor in expected[name].state_dict_tensors().items():
            assert torch.equal(tensors[key], tensor)


@pytest.mark.parametrize("groups", [0, 2])
def test_scales_of_groups_of_steps_are_those_of_modulated_trajectories(groups):
    ours, by_hand, module = small.build(), small.build(), small.build()
    config = dataclasses.replace(STEPWISE, step_groups=groups)
    quantize(ours, config, progress=False)
    modiff.apply(by_hand, config.model_config())
    modiff.calibrate(by_hand, lambda: small.call(by_hand, steps=STEPS, batch=BATCH))
    assert_same_scales(ours, by_hand)
    assert set(quantizers_of(ours.unet)["conv_in"].tables) == set(range(groups or STEPS - 1))

    def run(_: int) -> object:
        return small.call(module, steps=STEPS, batch=BATCH)

    quantize(module.unet, config, run=run, evaluations_per_run=STEPS, progress=False)  # in trajectories of its own
    assert_same_scales(module, ours)
