"""TFMQ-DM: temporal features are those of the network, rounded as one unit, with scales for each time step."""

import dataclasses

import pytest
import torch
from torch import Tensor

import modiff
from modiff import CalibrationError, ConfigError, ModulationConfig
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.methods import TfmqDmConfig, every_layer, quantize
from modiff.methods.tfmq_dm import TemporalBlock, reconstruct_temporal
from modiff.model.attach import attachment_of
from modiff.model.calibrate import quantizers_of
from tests.helpers import assert_within
from tests.hosts.tiny import HOSTS
from tests.methods import small
from tests.reference.quantizer import quantize_weight

STEPS = 5
QUICK = ReconstructConfig(iterations=60, batch=5, learning_rate=0.05, checks=4, patience=0)
SMALL = TfmqDmConfig(samples=4, batch=4, steps=STEPS, groups=2, reconstruction=None, temporal=QUICK)


def timesteps_of(pipe) -> list[float]:
    pipe.scheduler.set_timesteps(STEPS)
    return [float(t) for t in pipe.scheduler.timesteps]


@pytest.mark.parametrize("name", ["ddim", "sd"])
def test_the_block_computes_the_temporal_features_of_the_network(name):
    host = HOSTS[name]
    pipe = host.build()
    block = TemporalBlock(pipe.unet)
    seen: dict[str, list[Tensor]] = {}
    for projection in block.projections:
        pipe.unet.get_submodule(projection).register_forward_hook(
            lambda _m, _a, output, p=projection: seen.setdefault(p, []).append(output[:1].clone())
        )
    host.call(pipe, steps=STEPS)
    with torch.no_grad():
        features = block(torch.tensor(timesteps_of(pipe)))
    assert len(features) == len(block.projections) == len(seen) >= 4
    for projection, feature in zip(block.projections, features, strict=True):
        assert_within(feature, torch.cat(seen[projection][:STEPS]), 1e-5)
    assert block.layers == ("time_embedding.linear_1", "time_embedding.linear_2", *block.projections)


@pytest.mark.parametrize(("name", "message"), [("dit", "expected a U-Net with time_embedding"), ("sdxl", "add_embed")])
def test_a_network_without_a_block_of_the_time_step_alone_is_refused(name, message):
    host = HOSTS[name]
    model = getattr(host.build(), host.denoiser)
    with pytest.raises(ConfigError, match=message):
        TemporalBlock(model)


def features_of(weights: dict[str, Tensor], biases: dict[str, Tensor], sines: Tensor) -> list[Tensor]:
    """The temporal block in float64, written out; the names of its layers in order."""

    def layer(name: str, x: Tensor) -> Tensor:
        return x @ weights[name].T + biases[name]

    first, second, *projections = weights
    hidden = torch.nn.functional.silu(layer(second, torch.nn.functional.silu(layer(first, sines))))
    return [layer(name, hidden) for name in projections]


def test_the_loss_is_that_of_all_features_in_float64_and_learning_lowers_it():
    pipe = small.build()
    unet, times = pipe.unet, timesteps_of(pipe)
    block = TemporalBlock(unet)
    layers = {n: unet.get_submodule(n) for n in block.layers}
    floats = {n: m.weight.detach().double() for n, m in layers.items()}
    biases = {n: m.bias.detach().double() for n, m in layers.items()}
    with torch.no_grad():
        sines = unet.time_proj(torch.tensor(times)).double()
    exact = features_of(floats, biases, sines)

    def total(weights: dict[str, Tensor]) -> float:
        return sum(float((a - b).square().sum(1).mean())
                   for a, b in zip(features_of(weights, biases, sines), exact, strict=True))  # fmt: skip

    modiff.apply(pipe, every_layer(SMALL.static_layer(search="minmax")))
    report = reconstruct_temporal(unet, times, QUICK)
    assert report.before == pytest.approx(total({n: quantize_weight(w, 4) for n, w in floats.items()}), rel=1e-4)
    quantized = {n: attachment_of(unet).layers[n] for n in block.layers}
    learned = {n: layer.quantized_weight.dense(layer.weight, torch.float64) for n, layer in quantized.items()}
    assert report.learned
    assert report.after == pytest.approx(total(learned), rel=1e-4)
    assert report.after < 0.6 * report.before
    for name, exact_weight in floats.items():
        scale = exact_weight.abs().amax(1, keepdim=True) / 7
        assert float(((learned[name] - exact_weight).abs() / scale).max()) < 1 + 1e-4, "rounded up or down, no further"


def test_each_time_step_has_the_range_of_its_own_sines_and_others_are_refused():
    pipe = small.build()
    with torch.no_grad():
        sines = {t: pipe.unet.time_proj(torch.tensor([t])).double() for t in timesteps_of(pipe)}
    quantize(pipe, SMALL, progress=False)
    quantizers = quantizers_of(pipe.unet)
    quantizer = quantizers["time_embedding.linear_1"]
    assert {m[0] for m in quantizer.moments} == set(sines)
    for t, values in sines.items():
        ((scale, _),) = quantizer.tables[quantizer.moments[(t,)]]
        assert float(scale) == pytest.approx((float(values.max()) - min(float(values.min()), 0.0)) / 255, rel=1e-5)
    temporal = set(TemporalBlock(pipe.unet).layers)
    assert {name: q.tables is not None for name, q in quantizers.items()} == {n: n in temporal for n in quantizers}
    assert {name: q.static is None for name, q in quantizers.items()} == {n: n in temporal for n in quantizers}
    assert torch.isfinite(small.call(pipe, steps=STEPS)).all()
    with pytest.raises(CalibrationError, match=f"expected a step of the {STEPS} calibrated ones"):
        small.call(pipe, steps=STEPS + 1)


def test_with_modulation_the_other_layers_code_residuals_and_blocks_are_learned_apart_from_the_temporal_layers():
    pipe = small.build()
    quick = dataclasses.replace(QUICK, iterations=2, checks=1, batch=2)
    config = dataclasses.replace(
        SMALL, samples=2, batch=2, reconstruction=quick, temporal=quick, modulation=ModulationConfig()
    )
    report = quantize(pipe, config, progress=False)
    temporal = set(TemporalBlock(pipe.unet).layers)
    blocks = [unit for unit in report.weights.units if not temporal & set(unit.layers)]
    assert {unit.kind for unit in blocks} >= {"ResnetBlock2D"}
    assert set(report.weights.units[-1].layers) == temporal
    settings = {e.name: e.setting for e in report.taken}
    assert settings["time_embedding.linear_1"] == "W4A8 plain"
    assert settings["down_blocks.0.resnets.0.conv1"] == "W4A8 modulated"
    assert torch.isfinite(small.call(pipe, steps=STEPS)).all()
