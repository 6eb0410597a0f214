"""Networks, configs and measurements that the tests of reconstruction share."""

import dataclasses

import torch
from torch import Tensor, nn

import modiff
from modiff import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.calibration.data import CalibrationSet
from modiff.calibration.reconstruct.config import ReconstructConfig, ReconstructionReport
from modiff.calibration.reconstruct.run import learn_units
from modiff.core.affine import QParams
from modiff.model.attach import attachment_of
from tests.model.toys import activations_only, sample

KINDS = ("ResidualBlock", "Attention")
QUICK = ReconstructConfig(iterations=40, batch=8, learning_rate=0.1, checks=2)
STEPS = dataclasses.replace(ReconstructConfig.activation_scales(), iterations=40, batch=8, learning_rate=0.1, checks=4)
RESIDUAL = dataclasses.replace(STEPS, learn="residual_scales", unit="layer")
STATIC = QuantizerConfig(bits=4, dynamic=False)


def weights(bits: int | None = 3, **settings) -> ModiffConfig:
    """Plain layers that quantize their weights only; `settings` are fields of LayerConfig."""
    layer = LayerConfig(
        weight=WeightConfig(bits=bits), activation=QuantizerConfig(bits=None), modulation=None, **settings
    )
    return ModiffConfig(layer=layer)


def calls_of(model: nn.Module, steps: int = 4, pairs: bool = False) -> CalibrationSet:
    """A trajectory of sixteen samples."""
    return modiff.collect(model, lambda i: sample(model, steps, seed=i, batch=16), pairs=pairs, progress=False)


def applied(build, config: ModiffConfig, pairs: bool = False) -> tuple[nn.Module, CalibrationSet]:
    model = build()
    calls = calls_of(model, pairs=pairs)
    modiff.apply(model, config)
    return model, calls


def learn(model: nn.Module, calls, config=QUICK, kinds=KINDS, folder=None, **changes) -> ReconstructionReport:
    return learn_units(model, calls, dataclasses.replace(config, **changes), kinds=kinds, folder=folder, progress=False)


def layers_of(model: nn.Module):
    return attachment_of(model).layers


def codes_of(model: nn.Module) -> dict[str, list[Tensor]]:
    return {n: [c for c, _ in t.quantized_weight.codes(t.weight)] for n, t in layers_of(model).items()}


def same_codes(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> bool:
    return a.keys() == b.keys() and all(all(map(torch.equal, a[n], b[n])) for n in a)


def error_of(model: nn.Module, exact: list[Tensor]) -> float:
    """Relative L2 along a trajectory of other seeds."""
    with modiff.trajectory(model):
        pairs = zip(sample(model, seed=100), exact, strict=True)
        return float(sum((x - e).norm() ** 2 for x, e in pairs) ** 0.5)


def widened(model: nn.Module, calls: CalibrationSet, factor: float) -> dict[str, tuple[QParams, ...]]:
    """Calibrate, then make every static scale wrong by a factor."""
    modiff.calibrate(model, lambda: modiff.replay(model, calls))
    for quantized in layers_of(model).values():
        quantized.quantizer.static = tuple(QParams(q.scale * factor, q.zero_point) for q in quantized.quantizer.static)
    return {name: quantized.quantizer.static for name, quantized in layers_of(model).items()}


def static_config(symmetric: bool = True, modulation: ModulationConfig | None = None) -> ModiffConfig:
    config = activations_only(4, dynamic=False, symmetric=symmetric)
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=modulation))
