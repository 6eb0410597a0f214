"""Calibration watches what each layer will code, of one step if need be, and how large the steps are."""

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import CalibrationError, ConfigError, LayerConfig, ModiffConfig, ModiffWarning, QuantizerConfig, presets
from modiff.core.observers import MSEObserver
from modiff.core.quantizer import Quantizer
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits, drifting
from tests.model.toys import activations_only, applied, assert_equal, generate, sample, toy
from tests.recipes import recipe_of_layer
from tests.reference.recursion import run as reference_run


class Timed(nn.Module):
    """One layer, and a time step that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, sample: Tensor, timestep: float | Tensor = 0.0) -> Tensor:
        return self.layer(sample)


TIMES = [900.0, 700.0, 400.0, 0.0]
INPUTS = [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(4)]


def static(bits: int = 4, *, modulated: bool = True, **settings) -> nn.Module:
    """One layer with static scales for its activation, that are not measured yet."""
    torch.manual_seed(0)
    model, config = Timed(), activations_only(bits, dynamic=False, **settings)
    layer = config.layer if modulated else dataclasses.replace(config.layer, modulation=None)
    modiff.apply(model, dataclasses.replace(config, layer=layer, first_last="quantize"))
    return model


def play(model: nn.Module, inputs: list[Tensor] = INPUTS, times: list[float] = TIMES) -> list[Tensor]:
    times = times if len(times) == len(inputs) else [float(len(inputs) - i) for i in range(len(inputs))]
    with torch.no_grad(), modiff.trajectory(model):
        return [model(x, t) for x, t in zip(inputs, times, strict=True)]


def calibrate(model: nn.Module, *arguments, **options) -> nn.Module:
    modiff.calibrate(model, lambda: play(model, *arguments), **options)
    return model


def quantizer_of(model: nn.Module) -> Quantizer:
    return attachment_of(model).layers["layer"].quantizer


def scale_of(model: nn.Module) -> float:
    return float(quantizer_of(model).static[0].scale)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_scale_is_that_of_the_residuals_and_not_of_the_activations(bits):
    inputs = drifting(0, (4, 16), 20, 0.02, torch.float32)
    dynamic = activations_only(bits, granularity="tensor").layer
    steps = reference_run(inputs, recipe_of_layer(nn.Linear(16, 16), dynamic))
    largest = max(float(step.residual.abs().max()) for step in steps[1:])
    assert scale_of(calibrate(static(bits), inputs)) == pytest.approx(largest / (2 ** (bits - 1) - 1), rel=1e-5)
    assert largest < 0.25 * float(torch.stack(inputs).abs().max()), "the two must differ, else nothing is tested"


def test_a_calibrated_model_follows_its_network_and_repeats_itself():
    model, exact = toy(), sample(toy(), steps=8)
    modiff.apply(model, activations_only(8, dynamic=False))
    with pytest.raises(CalibrationError, match="expected measured scales, got none"):
        generate(model, steps=8)
    modiff.calibrate(model, lambda: generate(model, steps=8))
    for a, b, e in zip(generate(model, steps=8), generate(model, steps=8), exact, strict=True):
        assert_same_bits(b, a)
        assert float((a - e).norm() / e.norm()) < 0.01


FRESH = [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.mark.parametrize("groups", [1, 0])
def test_steps_whose_residuals_need_larger_scales_than_their_values_code_the_values(groups, tmp_path):
    model = calibrate(static(step_groups=groups), FRESH)
    plain = calibrate(static(modulated=False, step_groups=groups), FRESH[groups:], TIMES[groups:])  # of coded steps
    outputs = play(model, FRESH)
    assert_equal(outputs[1:], play(plain, FRESH)[1:])
    assert attachment_of(model).report.taken[0].reason == "codes values: residuals need larger scales" + (
        " at 3 of 3 steps" if groups == 0 else ""
    )
    modiff.save(model, tmp_path / "saved")
    assert_equal(play(modiff.load(tmp_path / "saved", into=Timed()), FRESH)[1:], outputs[1:])
    smooth = [FRESH[0] + 0.1 * x for x in FRESH]
    mixed = calibrate(model, [smooth[0], FRESH[1], FRESH[1] + 0.1 * FRESH[2]])
    assert quantizer_of(mixed).of_values == {0}, "of the larger timesteps first"
    calibrate(model, smooth)
    assert not quantizer_of(model).of_values
    assert attachment_of(model).report.taken[0].reason == ""


def test_calibration_tells_how_much_of_the_last_sample_is_in_this_one():
    a, b, c = FRESH[:3]
    expected = sum(float(torch.corrcoef(torch.stack(rows))[0, 1]) for rows in zip(b, b + c, strict=True)) / len(b)
    clock = attachment_of(model := calibrate(static(), [a, b, b + c])).clock
    assert clock.kept == pytest.approx(expected, rel=1e-5)
    calibrate(model, [a, -a])
    assert clock.kept == 0, "what is turned round is not kept"


class Conditioned(Timed):
    """A layer of tokens, and one of an embedding, which has one row a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)

    def forward(self, sample: Tensor, timestep: float | Tensor = 0.0) -> Tensor:
        return self.layer(sample) + self.embed(sample[:, 0]).unsqueeze(1)


def test_embeddings_keep_residuals_where_other_layers_read_tokens():
    """The whole image shares their error, from step to step."""
    model = Conditioned()
    config = activations_only(4, dynamic=False)
    modiff.apply(model, dataclasses.replace(config, first_last="quantize", default_exclude=()))
    calibrate(model, [torch.stack([x, x.roll(1, 0)], 1) for x in FRESH])
    of_values = {name: layer.quantizer.of_values for name, layer in attachment_of(model).layers.items()}
    assert of_values == {"layer": {0}, "embed": set()}


def test_an_observer_with_settings_of_its_own_can_be_given():
    x = torch.randn(2000, 16)
    x[0, 0] = 12.0
    scales = [scale_of(calibrate(static(modulated=False), [x], observer=observer))
              for observer in ("mse", lambda axis: MSEObserver(axis, trials=1))]  # fmt: skip
    assert scales[1] == pytest.approx(12 / 7, rel=1e-6)
    assert scales[0] < 0.8 * scales[1]


def test_a_loop_that_raises_keeps_the_scales_measured_before():
    model = calibrate(static())
    before = scale_of(model)

    def interrupted() -> None:
        play(model, [10 * x for x in INPUTS])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        modiff.calibrate(model, interrupted)
    overflowed = [*INPUTS[:2], INPUTS[2] * torch.inf, INPUTS[3]]
    with pytest.raises(CalibrationError, match=r"layer: expected finite values .*, got NaN or infinity at step 2"):
        calibrate(model, overflowed)
    with pytest.raises(CalibrationError, match="got NaN or infinity outside of a trajectory"):
        modiff.calibrate(plain := static(modulated=False), lambda: plain(overflowed[2]))
    assert scale_of(model) == before
    assert quantizer_of(model).watching is False
    play(model)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match=r"observer: expected one of minmax, .*, cosine, kl, got 'max'"):
        calibrate(static(), observer="max")
    dynamic = applied(presets.w8a4())
    with pytest.raises(CalibrationError, match="calibrate: expected layers with static scales, got none"):
        modiff.calibrate(dynamic, lambda: None)
    model = static()
    with pytest.raises(CalibrationError, match="layer: expected inputs while calibrating, got none"):
        calibrate(model, INPUTS[:1])  # scales observed at the first step alone never see a residual
    assert quantizer_of(model).watching is False


@pytest.mark.parametrize("modulated", [True, False])
def test_a_sampler_with_other_steps_is_an_error_and_not_the_nearest_scale(modulated):
    model = calibrate(static(modulated=modulated, step_groups=0))
    steps = [(700.0, 900.0), (400.0, 700.0), (0.0, 400.0)] if modulated else [(t,) for t in TIMES]
    assert sorted(quantizer_of(model).moments, reverse=True) == steps
    assert_equal(play(model), play(model))
    with pytest.raises(CalibrationError, match=r"expected a step of the . calibrated ones, .* got timestep 600"):
        play(model, INPUTS, [900.0, 600.0, 400.0, 0.0])
    coarser = INPUTS[::2], [900.0, 400.0]  # the inputs of a step are the same, its residual is of a step twice as long
    if not modulated:
        assert len(play(model, *coarser)) == 2
        return
    with pytest.raises(CalibrationError, match="got timestep 400 after 900"):
        play(model, *coarser)


def test_plain_layers_find_their_step_also_outside_of_a_trajectory_and_for_a_whole_batch_of_timesteps():
    model = calibrate(static(modulated=False, step_groups=0))
    expected = play(model)
    with torch.no_grad():
        assert_same_bits(model(INPUTS[1], torch.full((4,), 700.0)), expected[1])
        with pytest.raises(modiff.StateError, match="expected one timestep for the whole batch, got several"):
            model(INPUTS[1], torch.tensor([700.0, 400.0, 700.0, 700.0]))


def test_both_contexts_of_guidance_share_the_scales_of_a_step():
    model = static(step_groups=0)

    def guided() -> None:
        with torch.no_grad(), modiff.trajectory(model):
            for t, x in zip(TIMES, INPUTS, strict=True):
                for name, factor in (("cond", 1.0), ("uncond", 3.0)):
                    with modiff.context(model, name):
                        model(factor * x, t)

    modiff.calibrate(model, guided)
    quantizer = quantizer_of(model)
    shared = float(quantizer.tables[quantizer.moments[(700.0, 900.0)]][0].scale)
    alone = quantizer_of(calibrate(static(step_groups=0)))
    assert shared == pytest.approx(3 * float(alone.tables[0][0].scale), rel=1e-5)


STATIC = activations_only(8, dynamic=False)
MESSAGE = "expected steps of at most 100 timesteps, as its static scales were measured with, got one of 166.667"


def calibrated(config: ModiffConfig = STATIC) -> nn.Module:
    model = applied(config)
    if not config.layer.activation.dynamic:
        modiff.calibrate(model, lambda: generate(model, steps=10))
    return model


def test_a_step_that_is_much_larger_than_the_calibrated_ones_warns_once_and_measuring_again_forgets_them():
    model = calibrated()
    generate(model, steps=10)
    generate(model, steps=7)  # 143 timesteps: slightly fewer steps are as good
    with pytest.warns(ModiffWarning, match=MESSAGE):
        generate(model, steps=6)
    generate(model, steps=6)
    modiff.calibrate(model, lambda: generate(model, steps=4))
    with pytest.raises(CalibrationError):
        modiff.calibrate(model, lambda: None)
    assert attachment_of(model).step_sizes.largest == 250


def test_scales_that_are_dynamic_of_values_or_of_each_step_have_no_step_size():
    plain = ModiffConfig(layer=LayerConfig(activation=QuantizerConfig(dynamic=False), modulation=None))
    for config in (activations_only(8), plain, activations_only(8, dynamic=False, step_groups=0)):
        assert attachment_of(calibrated(config)).step_sizes.largest is None


@pytest.mark.parametrize("learned", [False, True])
def test_pairs_of_steps_say_how_large_a_step_is(learned):
    model = toy()
    calls = modiff.collect(model, lambda i: sample(model, 10, batch=4), pairs=True, progress=False)
    modiff.apply(model, STATIC)
    if learned:
        config = modiff.ReconstructConfig(learn="residual_scales", unit="layer", iterations=1, checks=1)
        modiff.reconstruct(model, calls, config, progress=False)
    else:
        modiff.calibrate(model, lambda: modiff.replay(model, calls))
    with pytest.warns(ModiffWarning, match=MESSAGE):
        generate(model, steps=6)


def test_a_checkpoint_keeps_the_step_size_and_one_without_it_is_not_checked(tmp_path):
    modiff.save(calibrated(), tmp_path / "new")
    assert attachment_of(modiff.load(tmp_path / "new", into=toy())).step_sizes.largest == 100
    config = tmp_path / "new" / "config.json"
    config.write_text(config.read_text().replace('"largest_step": 100.0', '"largest_step": null'))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(modiff.load(tmp_path / "new", into=toy()), steps=3)
