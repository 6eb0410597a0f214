"""MoDiff's three kinds: dynamic scales, ranges of residuals, learned scales that are never worse than they began."""

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
from tests.helpers import assert_same_tensors
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
    inputs: dict[str, list[Tensor]] = {}
    for name, module in pipe.unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].detach().double().clone())
            )
    small.call(pipe, steps=STEPS, batch=BATCH)
    return inputs


@pytest.fixture(scope="module")
def residuals() -> dict[str, list[Tensor]]:
    """a_t - a_{t+1} of the kept steps; every T / groups = 2 steps, without the first."""
    return {n: [a[s] - a[s - 1] for s in (2, 4)] for n, a in inputs_of_each_step().items()}


@pytest.mark.parametrize("bits", [2, 4])
def test_symmetric_scales_cover_the_largest_residual_of_each_half(residuals, bits):
    pipe = small.build()
    quantize(pipe, dataclasses.replace(MINMAX, activation_bits=bits), progress=False)
    splits, quantizers = shortcut_splits(pipe.unet), quantizers_of(pipe.unet)
    assert set(quantizers) == set(residuals)
    assert splits
    for name, tensors in residuals.items():
        halves = torch.stack(tensors).tensor_split([splits[name]], 2) if name in splits else (torch.stack(tensors),)
        scales = [float(q.scale) for q in quantizers[name].static]
        assert scales == pytest.approx([float(r.abs().max()) / (2 ** (bits - 1) - 1) for r in halves], rel=1e-4)


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
    weight = pipe.unet.conv_out.weight.detach().double()
    quick = dataclasses.replace(LEARNS, held_out=0.75, iterations=1)
    config = dataclasses.replace(LEARNED, activation_bits=2, weight_bits=None, learning=quick)
    report = quantize(pipe, config, progress=False)
    unit = next(u for u in report.scales.units if u.name == "conv_out")
    scale = max(float(r.abs().max()) for r in residuals["conv_out"])  # qmax is 1 at 2 bits
    inputs = inputs_of_each_step()["conv_out"]
    losses = []
    for step in (2, 4):
        residual = inputs[step] - inputs[step - 1]
        error = torch.nn.functional.conv2d(
            residual - scale * (residual / scale).round().clamp(-2, 1), weight, padding=1
        )
        losses += error.abs().pow(2.4).sum(1).flatten(1).mean(1).tolist()
    # 3 of the 4 rows are held out, which ones the seed decides
    triples = [sum(losses[:i] + losses[i + 1 :]) / 3 for i in range(4)]
    assert min(abs(unit.before / t - 1) for t in triples) < 1e-3


@pytest.mark.parametrize("search", ["mse", "minmax"])
def test_dynamic_scales_with_rounding_to_nearest_need_no_trajectory(search):
    pipe = small.build()
    plain, config = small.call(pipe, steps=STEPS), dataclasses.replace(SMALL, search=search, weight_bits=4)
    report = quantize(pipe, config, run=lambda i: pytest.fail("nothing is to be calibrated"), progress=False)
    assert {e.setting for e in report.entries} == {"W4A4 modulated"}
    assert (report.weights, report.scales) == (None, None)
    weight = pipe.unet.conv_out.weight
    scale, widest = pipe.unet.conv_out.quantized_weight.codes(weight)[0][1].scale, weight.abs().amax((1, 2, 3)) / 7
    assert torch.allclose(scale.flatten(), widest) == (search == "minmax")
    assert 0 < float((small.call(pipe, steps=STEPS) - plain).norm() / plain.norm()) < 0.2


LINEAR = ModulationConfig(predictor="linear")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "static_learned", "activation_bits": None}, r"activation_bits: expected 2 to 8 with kind='static_le"),
        ({"kind": "static_minmax", "modulation": LINEAR}, r"modulation: expected predictor='hold' with kind='static_m"),
        ({"step_groups": -1}, r"ModiffMethodConfig\.step_groups: expected 0 or more groups, got -1"),
        ({"learning": ReconstructConfig()}, r"ModiffMethodConfig\.learning\.learn: expected 'activation_scales'"),
        ({"activation_bits": 3, "modulation": LINEAR}, r"LayerConfig\.modulation\.predictor: expected 'hold' at 3 b"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModiffMethodConfig(**settings)


STEPWISE = dataclasses.replace(SMALL, kind="static_steps", step_groups=2)


def assert_same_scales(ours, theirs) -> None:
    expected = quantizers_of(theirs.unet)
    for name, quantizer in quantizers_of(ours.unet).items():
        assert_same_tensors(quantizer.state_dict_tensors(), expected[name].state_dict_tensors())


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
