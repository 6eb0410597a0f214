"""Layer errors: each figure against an independent float64 recursion, for every kind of loop."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from modiff import presets
from modiff.config import LayerConfig, ModulationConfig, QuantizerConfig
from modiff.evaluate.analysis.layers import LayerTrace, LayerTraces
from modiff.evaluate.analysis.watch import watch
from tests.evaluate.analysis.networks import OneLayer, driven, only_layer
from tests.helpers import drifting
from tests.recipes import float64, recipe_of_layer, sizes_of
from tests.reference import recursion
from tests.reference.hadamard import along
from tests.reference.quantizer import quantize_segments

LAYERS = {"linear": (nn.Linear(8, 5), (2, 3, 8)), "conv": (nn.Conv2d(4, 3, 3, padding=1), (2, 4, 3, 3))}


def config(bits: int = 4, clip: float = 1.0, rotation: str = "none", **modulation: object) -> LayerConfig:
    return float64(
        LayerConfig(
            activation=QuantizerConfig(bits=bits, clip=clip),
            modulation=ModulationConfig(**modulation),
            rotation=rotation,
        )
    )


CONFIGS = {
    "published": config(),
    "clipped, rotated, linear": config(3, 0.6, "hadamard", predictor="linear", gain=0.8),
    "open loop": config(3, error_compensation="none"),
    "zero bits": config(0),
    "coded start": config(2, 0.7, first_step="coded", rounds=2),
    "anchored again": config(3, reanchor_every=3),
}


def watched(layer: nn.Module, inputs: list[Tensor], chosen: LayerConfig, timesteps: list[float]) -> LayerTrace:
    network = OneLayer(layer).double()
    errors = LayerTraces()
    watch(network, driven(network, inputs, timesteps), only_layer(chosen), [errors])
    (trace,) = errors.layers()
    return trace


def norm(x: Tensor) -> float:
    return math.sqrt(sum(v * v for v in x.flatten().tolist()))


def approximately(value: float) -> object:
    return pytest.approx(value, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_local_view_equals_an_independent_float64_recursion(kind: str, name: str) -> None:
    layer, shape = LAYERS[kind]
    inputs = drifting(3, shape, 6, 0.3)
    timesteps = [900.0, 800.0, 740.0, 500.0, 460.0, 100.0]
    trace = watched(layer, inputs, CONFIGS[name], timesteps)
    layer = layer.double()
    recipe = recipe_of_layer(layer, CONFIGS[name])
    input_state = torch.zeros(())
    for row, x, step in zip(trace["steps"], inputs, recursion.run(inputs, recipe, sizes_of(timesteps)), strict=True):
        a = x if recipe.matrix is None else along(x, recipe.matrix, recipe.channel_dim)
        starts = row["step"] == 0 or (recipe.reanchor_every and row["step"] % recipe.reanchor_every == 0)
        sent = torch.zeros_like(a) if step.sent is None else step.sent.value
        input_state = step.input_state if recipe.compensated or starts else input_state + sent
        assert row["activation_min"] == approximately(float(a.min()))
        assert row["activation_max"] == approximately(float(a.max()))
        assert row["activation_rms"] == approximately(norm(a) / a.numel() ** 0.5)
        assert row["input_error"] == approximately(norm(a - input_state))
        assert row["input_relative_l2"] == approximately(norm(a - input_state) / norm(a))
        output = layer(x).detach()
        assert row["output_error"] == approximately(norm(output - step.output_state))
        assert row["output_relative_l2"] == approximately(norm(output - step.output_state) / norm(output))
        if starts:
            assert (row["residual_min"], row["residual_max"], row["residual_rms"], row["code_error"]) == (None,) * 4
        else:
            assert row["residual_min"] == approximately(float(step.residual.min()))
            assert row["residual_max"] == approximately(float(step.residual.max()))
            assert row["residual_rms"] == approximately(norm(step.residual) / a.numel() ** 0.5)
            assert row["code_error"] == approximately(norm(step.residual - sent))


def test_a_plain_layer_codes_all_of_its_input_at_every_step() -> None:
    layer, inputs = LAYERS["linear"][0], drifting(3, LAYERS["linear"][1], 3, 0.3)
    chosen = presets.plain(None, 4).layer
    for row, x in zip(watched(layer, inputs, chosen, [3.0, 2.0, 1.0])["steps"], inputs, strict=True):
        coded = quantize_segments(x, (8,), 4, "token", symmetric=True, clip=1.0, channel_dim=-1).value
        assert row["residual_rms"] == approximately(norm(x) / x.numel() ** 0.5)
        assert row["code_error"] == approximately(norm(x - coded))
        assert row["input_error"] == approximately(norm(x - coded))


def test_full_precision_activations_leave_the_weight_error_alone() -> None:
    layer, inputs = LAYERS["linear"][0], drifting(3, LAYERS["linear"][1], 3, 0.3)
    chosen = dataclasses.replace(config(), activation=QuantizerConfig(bits=None))
    rows = watched(layer, inputs, chosen, [3.0, 2.0, 1.0])["steps"]
    assert all(r["input_error"] == 0 and r["code_error"] is None and r["output_error"] > 0 for r in rows)


def test_layers_that_no_scale_fits_are_named() -> None:
    network, errors = OneLayer(nn.Linear(8, 5)), LayerTraces()
    inputs = drifting(3, (2, 8), 3, 0.3, torch.float32)
    inputs[1][:, 3] = 1.7e9
    watch(network, driven(network, inputs), only_layer(config()), [errors])
    assert [(o.name, o.channels, o.largest) for o in errors.maxima.outliers()] == [("layer", 1, inputs[1].max())]
