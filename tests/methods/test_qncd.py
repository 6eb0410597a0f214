"""QNCD: smoothing that changes nothing without rounding, and a bias whose estimate touches no state."""

import dataclasses
import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import modiff
from modiff import ConfigError, LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.api import save
from modiff.cli.options import quiet_pipeline
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import calibration_run
from modiff.methods import QncdConfig, qncd, quantize
from modiff.methods.qncd import estimate_bias, mean_error, smoothing_factors, smoothing_of
from modiff.methods.sampler_steps import SamplerSteps
from modiff.model.attach import attachment_of
from tests.helpers import relative_error
from tests.hosts.tiny import HOSTS
from tests.methods import small

STEPS = 5
SMALL = QncdConfig(steps=STEPS, samples=4, batch=4, groups=2, pairs=4, rounding="nearest", interval=2)
FLOATS = LayerConfig(weight=WeightConfig(bits=None), activation=QuantizerConfig(bits=None), modulation=None)


def build():
    """The small pipeline as one that predicts noise; its norms have weights of either sign, one near 0."""
    pipe = small.build()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon", clip_sample=False)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if name.endswith("norm2.weight"):
                parameter.copy_(torch.linspace(-1, 2, len(parameter)))
                parameter[0] = 1e-6
    return pipe


def calls_of(pipe, batch: int = 4):
    run = calibration_run(pipe, steps=STEPS, batch=batch, seed=0)
    return list(modiff.collect(pipe, run, progress=False))


def with_factors(config: LayerConfig, smoothing: dict[str, Tensor]) -> ModiffConfig:
    return qncd.smoothed(
        ModiffConfig(layer=config, default_exclude=(), min_weights=0, first_last="quantize"), smoothing
    )


@pytest.mark.parametrize("residuals", [False, True])
def test_smoothing_changes_the_floats_by_less_than_rounding_and_the_codes_of_weights(residuals):
    pipe = build()
    smoothing = smoothing_of(pipe.unet, calls_of(pipe), residuals=residuals)
    exact = small.call(pipe, steps=STEPS)
    assert set(smoothing) == {n for n, _ in pipe.unet.named_modules() if n.endswith("conv2")}
    assert all((s > 0).all() and s.max() > s.min() for s in smoothing.values())
    modiff.apply(pipe, with_factors(FLOATS, smoothing))
    assert 0 < relative_error(small.call(pipe, steps=STEPS), exact) < 1e-5
    modiff.remove(pipe)
    assert torch.equal(small.call(pipe, steps=STEPS), exact)
    weight = dataclasses.replace(FLOATS, weight=WeightConfig(bits=4))
    modiff.apply(pipe, with_factors(weight, smoothing))
    for name, s in smoothing.items():
        layer = attachment_of(pipe.unet).layers[name]
        ((codes, qparams),) = layer.quantized_weight.codes(layer.weight)
        floats = layer.weight.detach().double() * s.double().view(1, -1, 1, 1)
        scale = floats.abs().flatten(1).amax(1).view(-1, 1, 1, 1) / 7
        assert relative_error(qparams.scale, scale) < 1e-6
        assert ((codes - floats / scale).abs() < 0.5 + 1e-4).all()


def test_factors_are_the_safe_form_by_hand():
    """Weights 4, -2, .01, 1: median 1, floor .1. The mean of max(n, 1) over two steps."""
    norms = torch.tensor([[3.0, 0.5, 2.0, -1.0], [1.0, 2.0, 4.0, 0.0]])
    s = smoothing_factors(torch.tensor([4.0, -2.0, 0.01, 1.0]), norms)
    assert s.tolist() == pytest.approx([4 * 2, 2 * 1.5, 0.1 * 3, 1 * 1])
    assert smoothing_factors(None, norms).tolist() == pytest.approx([2, 1.5, 3, 1])


@pytest.mark.parametrize("residuals", [False, True])
def test_factors_of_a_block_are_those_of_its_embedding_or_of_its_changes_written_out(residuals):
    pipe, name = build(), "mid_block.resnets.0"
    calls, block, seen = calls_of(pipe), pipe.unet.get_submodule(name), []
    hooked = block.conv2 if residuals else block.time_emb_proj
    hook = hooked.register_forward_hook(
        lambda _m, args, output: seen.append((args[0] if residuals else output).clone())
    )
    smoothing = smoothing_of(pipe.unet, calls, residuals=residuals)[f"{name}.conv2"]
    hook.remove()
    if residuals:
        moves = [(b - a).abs().amax((0, 2, 3)) for a, b in itertools.pairwise(seen)]
        n, weight = torch.stack([m / m.median() for m in moves]), torch.ones(())
    else:
        rows = torch.cat(seen).double().unflatten(1, (block.norm2.num_groups, -1))
        n = ((rows - rows.mean(2, keepdim=True)) / (rows.var(2, correction=0, keepdim=True) + 1e-5).sqrt()).flatten(1)
        g = block.norm2.weight.detach().abs()
        weight = g.clamp_min(0.1 * g.median())
    assert relative_error(smoothing, weight * n.clamp_min(1).mean(0)) < 1e-5


@pytest.mark.parametrize("modulation", [None, ModulationConfig(state_dtype="float32")])
def test_smoothed_layers_compute_alike_on_integers_and_after_saving(modulation, tmp_path):
    pipe = build()
    smoothing = smoothing_of(pipe.unet, calls_of(pipe), residuals=modulation is not None)
    config = with_factors(LayerConfig(modulation=modulation), smoothing)
    modiff.apply(pipe, config)
    simulated = small.call(pipe, steps=STEPS)
    save(pipe, tmp_path / "saved", anchor_weights="quantized" if modulation is None else "int8")
    weight = attachment_of(pipe.unet).layers["mid_block.resnets.0.conv2"].weight.detach().clone()
    modiff.remove(pipe)
    modiff.apply(pipe, config.on_integers())
    assert relative_error(small.call(pipe, steps=STEPS), simulated) < 1e-3
    saved = load_pipeline(tmp_path / "saved")
    assert relative_error(small.call(saved, steps=STEPS), simulated) < (1e-6 if modulation is None else 1e-2)
    assert relative_error(attachment_of(saved.unet).layers["mid_block.resnets.0.conv2"].weight, weight) < 0.1
    layer = dataclasses.replace(FLOATS, smoothing=(1.0, 2.0))
    with pytest.raises(
        ConfigError, match=r"expected smoothing of .* channels of a layer without groups, got 2 factors"
    ):
        modiff.apply(build(), ModiffConfig(layer=layer))
    with pytest.raises(ConfigError, match="smoothing: expected positive numbers"):
        dataclasses.replace(FLOATS, smoothing=(0.0,))


def test_without_quantization_the_bias_is_0_up_to_the_noise_of_a_mean():
    """Data N(0, 1.5): the noise that a perfect network predicts is linear in the state, and so is the marginal."""
    kept_t, kept_s, n, d = 0.4, 0.6, 200, 512
    draw = torch.Generator().manual_seed(3)
    clean, first, again = (torch.randn(n, d, generator=draw, dtype=torch.float64) for _ in range(3))
    state = math.sqrt(kept_s * 1.5) * clean + math.sqrt(1 - kept_s) * first

    def predict(x: Tensor) -> Tensor:
        return math.sqrt(1 - kept_t) * x / (kept_t * 1.5 + 1 - kept_t)

    bound = 3 * math.sqrt(2 / (n * d))
    assert abs(float(mean_error(state, again, kept_t / kept_s, predict))) < bound
    assert abs(float(mean_error(state, again, kept_t / kept_s, lambda x: predict(x) + 0.02)) - 0.02) < bound < 0.02


def test_the_embedded_model_in_full_precision_has_no_bias_on_noised_images():
    """Along its sampler it has one: states drift from noised data."""
    pipe = set_scheduler(quiet_pipeline("embedded", "cpu"), "ddim")
    images = (
        torch.from_numpy(pipe(batch_size=24, num_inference_steps=8, output_type="np").images).movedim(-1, 1) * 2 - 1
    )
    draw, kept = torch.Generator().manual_seed(0), pipe.scheduler.alphas_cumprod
    for t, s in ((840, 820), (540, 520), (240, 220)):
        first, again = (torch.randn(images.shape, generator=draw) for _ in range(2))
        state = kept[s].sqrt() * images + (1 - kept[s]).sqrt() * first
        with torch.no_grad():
            bias = mean_error(state, again, float(kept[t] / kept[s]), lambda x, t=t: pipe.unet(x, t).sample)
        assert abs(float(bias)) < 3 * math.sqrt(2 / images.numel())


def test_full_precision_against_itself_has_no_bias_at_all():
    pipe = build()
    steps = [SamplerSteps(pipe.unet, pipe.scheduler, calls_of(pipe), None)]
    assert estimate_bias(steps, pipe.unet, SMALL).abs().max() == 0
    assert estimate_bias(steps, pipe.unet, dataclasses.replace(SMALL, reference="noise")).abs().max() > 0


@pytest.mark.parametrize("modulation", [None, ModulationConfig()])
def test_an_estimate_touches_no_state_of_the_trajectory(modulation, monkeypatch):
    pipe = build()
    calls = calls_of(pipe)
    steps = [SamplerSteps(pipe.unet, pipe.scheduler, calls, None)]
    modiff.apply(pipe, ModiffConfig(layer=LayerConfig(modulation=modulation)))
    layers, compared = attachment_of(pipe.unet).layers, []

    def tensors() -> list[Tensor]:
        memories = [m for layer in layers.values() for (name, _), m in layer.loop.memories.items() if name == "batch 0"]
        return [t.clone() for memory in memories for t in (*memory.input.tensors(), memory.output.value)]

    def without_effect(state, noise, kept, predict, exact):
        before = tensors()
        predict(state)
        compared.append(len(before))
        assert all(map(torch.equal, before, tensors()))
        return torch.zeros((), dtype=torch.float64)

    monkeypatch.setattr(qncd, "mean_error", without_effect)
    outputs = []
    evaluate = SamplerSteps.evaluate
    monkeypatch.setattr(SamplerSteps, "evaluate", lambda *a: outputs.append(evaluate(*a)) or outputs[-1])
    assert estimate_bias(steps, pipe.unet, SMALL).abs().max() == 0
    assert len(compared) == (STEPS if modulation else 2)
    assert (min(compared) > 20) == (modulation is not None)
    probed, outputs[:] = outputs[:1] + outputs[1:], []
    monkeypatch.setattr(qncd, "mean_error", lambda *a: torch.zeros((), dtype=torch.float64))
    estimate_bias(steps, pipe.unet, SMALL)
    for output in outputs:  # those of the trajectory alone, to the bit
        assert any(torch.equal(output, other) for other in probed)


@pytest.mark.parametrize("modulation", [None, ModulationConfig()])
def test_the_estimated_bias_is_subtracted_by_the_sampler_until_the_next_estimate(modulation, monkeypatch):
    monkeypatch.setattr(qncd, "LEAST", 4 * 192)
    pipe = build()
    report = quantize(pipe, dataclasses.replace(SMALL, modulation=modulation), progress=False)
    assert {e.setting for e in report.taken} == {f"W4A8 {'plain' if modulation is None else 'modulated'}"}
    ((name, bias),) = report.steps
    assert name == "bias"
    assert (bias[0], bias[1], bias[3]) == (0, bias[2], bias[4])
    assert len(set(bias)) == 3
    assert [row for (row,) in pipe.scheduler.correction.offset] == pytest.approx([-b for b in bias])
    assert any(layer.config.smoothing for layer in attachment_of(pipe.unet).layers.values())
    assert torch.isfinite(small.call(pipe, steps=STEPS)).all()


def test_too_few_values_and_what_cannot_be_smoothed_or_compared_are_refused_with_the_reason():
    pipe = build()
    few = r"pairs: expected batch x d of at least 100000 for the bias, here 521 pairs of 192 values, got 4\. "
    with pytest.raises(ConfigError, match=few + r"The mean holds .*0.036 of 4 x 192 = 768 values\. Give more pairs"):
        quantize(pipe, SMALL, progress=False)
    for other, message in (
        (small.build(), "bias: expected 'none' with DDIMScheduler and prediction_type='sample', got 'estimated'"),
        (set_scheduler(build(), "ddpm"), "bias: expected 'none' with DDPMScheduler and prediction_type='epsilon'"),
        (HOSTS["dit"].build(), "expected residual blocks that add time_emb_proj before a group norm, got none"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantize(other, SMALL, run=lambda i: pytest.fail("before anything is run"), progress=False)
    for changes, message in (
        ({"interval": 0}, "interval: expected 1 or more"),
        ({"eta": 1.0}, "eta: expected 0, got 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(SMALL, **changes)
    assert attachment_of(pipe.unet) is None
