"""Watchers of a full-precision network against an independent float64 recursion, and bounds on the errors."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import modiff
from modiff import presets
from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig
from modiff.core.affine import QParams
from modiff.core.quantizer import Code
from modiff.errors import CalibrationError, ConfigError, StateError
from modiff.evaluate.analysis.growth import (
    ErrorGrowth,
    Growth,
    compensated_bound,
    printed_bound,
    scale_energy,
    uncompensated_bound,
)
from modiff.evaluate.analysis.layers import HISTOGRAM_BINS, Distribution, LayerTrace, LayerTraces
from modiff.evaluate.analysis.watch import Visit, watch
from modiff.hosts.diffusers.runs import calibration_run
from tests.helpers import assert_same_bits, drifting
from tests.hosts.tiny import HOSTS
from tests.pixels import pixel_pipeline
from tests.recipes import float64, randomised, recipe_of_layer, sizes_of
from tests.reference import recursion
from tests.reference.hadamard import along
from tests.reference.quantizer import quantize_runs


class OneLayer(nn.Module):
    """A network that is one layer, called `times` times in each evaluation."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = randomised(layer), times

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        for _ in range(self.times):
            x = self.layer(x)
        return x


def only_layer(config: LayerConfig) -> ModiffConfig:
    """Takes the layer of OneLayer, small and first and last as it is."""
    return ModiffConfig(layer=config, include=("layer",))


def driven(
    network: nn.Module, inputs: Sequence[Tensor], timesteps: Sequence[float] | None = None
) -> Callable[[], None]:
    """Evaluates the network on each input in turn."""

    @torch.no_grad()
    def run() -> None:
        for x, t in zip(inputs, timesteps or range(len(inputs)), strict=True):
            network(x, float(t))

    return run


class Recorder:
    def __init__(self) -> None:
        self.visits: list[Visit] = []

    def see(self, visit: Visit) -> None:
        self.visits.append(visit)


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_every_call_of_every_layer_is_shown_at_every_step_with_its_own_tensors() -> None:
    network, recorder = OneLayer(nn.Linear(6, 6), times=2), Recorder()
    inputs = drifting(0, (2, 6), 3, 0.1, torch.float32)
    report = watch(network, driven(network, inputs), only_layer(LayerConfig()), [recorder])
    assert [e.name for e in report.taken] == ["layer"]
    assert [(v.key, v.step) for v in recorder.visits] == [(("layer", c), s) for s in range(3) for c in range(2)]
    for visit, x in zip(recorder.visits[::2], inputs, strict=True):
        assert_same_bits(visit.input, x)
        assert_same_bits(visit.output, network.layer(x).detach())


def test_a_pipeline_generates_the_same_bits_watched_and_has_its_splits_shown() -> None:
    pipe = HOSTS["ddim"].build()
    run = partial(calibration_run(pipe, steps=3, batch=2), 0)
    plain = torch.as_tensor(run())
    watched: list[torch.Tensor] = []
    recorder, before = Recorder(), hooks(pipe.unet)
    watch(pipe, lambda: watched.append(torch.as_tensor(run())), presets.w8a4(), [recorder])
    assert_same_bits(watched[0], plain)
    assert hooks(pipe.unet) == before
    splits = {v.entry.name: v.split for v in recorder.visits if v.split}
    assert splits
    assert all(f"split at {v.split}" in v.entry.reason for v in recorder.visits if v.split)


def test_a_modulated_target_several_networks_and_single_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = OneLayer(nn.Linear(6, 6)), drifting(0, (1, 6), 2, 0.1, torch.float32)
    for few in (inputs[:0], inputs[:1]):
        with pytest.raises(CalibrationError, match="got fewer of layer"):
            watch(network, driven(network, few), only_layer(LayerConfig()), [])
    modiff.apply(network, only_layer(LayerConfig()))
    with pytest.raises(StateError, match="with modulated layers"):
        watch(network, lambda: None, only_layer(LayerConfig()), [])
    two = {"unet": network, "prior": network}
    monkeypatch.setattr("modiff.evaluate.analysis.watch.networks_of", lambda target: two)
    with pytest.raises(ConfigError, match=r"expected one network, got \['unet', 'prior'\]"):
        watch(network, lambda: None, only_layer(LayerConfig()), [])


def test_histograms_equal_a_loop_over_all_values() -> None:
    inputs, network = drifting(2, (3, 8), 5, 0.4, torch.float32), OneLayer(nn.Linear(8, 5))
    distribution = Distribution()
    watch(network, driven(network, inputs), only_layer(LayerConfig()), [distribution])
    result = distribution.result()
    for name, earlier in (("activation", 0.0), ("difference", 1.0)):
        counts = [0] * HISTOGRAM_BINS
        for last, x in pairwise(inputs):
            for value in ((x - earlier * last) / x.abs().max()).flatten().tolist():
                counts[min(HISTOGRAM_BINS - 1, max(0, int((value + 1) / 2 * HISTOGRAM_BINS)))] += 1
        assert result[name] == counts


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
        coded = quantize_runs(x, (8,), 4, "token", symmetric=True, clip=1.0, channel_dim=-1).value
        assert row["residual_rms"] == approximately(norm(x) / x.numel() ** 0.5)
        assert row["code_error"] == approximately(norm(x - coded))
        assert row["input_error"] == approximately(norm(x - coded))


def test_full_precision_activations_leave_the_weight_error_alone() -> None:
    layer, inputs = LAYERS["linear"][0], drifting(3, LAYERS["linear"][1], 3, 0.3)
    chosen = dataclasses.replace(config(), activation=QuantizerConfig(bits=None))
    rows = watched(layer, inputs, chosen, [3.0, 2.0, 1.0])["steps"]
    assert all(r["input_error"] == 0 and r["code_error"] is None and r["output_error"] > 0 for r in rows)


SLACK = 1 + 1e-4  # the states are float32


def grown(layer: nn.Module, inputs: list[torch.Tensor], config: LayerConfig) -> Growth:
    network = OneLayer(layer)
    growth = ErrorGrowth()
    watch(network, driven(network, inputs), only_layer(config), [growth])
    return growth.growth()


@pytest.fixture(scope="module")
def unet() -> Growth:
    pipe = pixel_pipeline()
    growth = ErrorGrowth()
    watch(pipe, partial(calibration_run(pipe, steps=8, batch=2), 0), presets.w8a4(), [growth])
    return growth.growth()


def test_every_error_of_every_layer_is_below_its_bound(unet: Growth) -> None:
    assert len(unet["layers"]) >= 8
    for layer in unet["layers"]:
        assert 0 < layer["c"] < 1
        for mode in ("compensated", "uncompensated"):
            for error, bound in zip(layer[mode]["error"], layer[mode]["bound"], strict=True):
                assert 0 < error <= bound * SLACK
    assert unet["compensated"]["exceeded"] == 0
    assert unet["uncompensated"]["exceeded"] == 0


def test_both_loops_and_c_equal_an_independent_float64_recursion() -> None:
    layer = nn.Linear(8, 5)
    inputs = drifting(5, (2, 3, 8), 7, 0.3)
    config = LayerConfig(activation=QuantizerConfig(bits=3, clip=0.7), modulation=ModulationConfig(predictor="linear"))
    (growth,) = grown(layer.double(), inputs, config)["layers"]
    shares = []
    for mode, compensation in (("compensated", "closed_loop"), ("uncompensated", "none")):
        hold = LayerConfig(activation=config.activation, modulation=ModulationConfig(error_compensation=compensation))
        input_state = inputs[0]
        for i, step in enumerate(recursion.run(inputs, recipe_of_layer(layer, hold))[1:]):
            input_state = input_state + step.sent.value
            assert growth["moves"][i] == pytest.approx(float((inputs[i + 1] - inputs[i]).norm()))
            assert growth["norms"][i] == pytest.approx(float(inputs[i + 1].norm()))
            assert growth[mode]["error"][i] == pytest.approx(float((inputs[i + 1] - input_state).norm()), rel=1e-4)
            shares.append(float((step.residual - step.sent.value).square().sum() / step.residual.square().sum()))
    assert growth["c"] == pytest.approx(max(shares), rel=1e-4)


def test_a_rest_and_a_jump_break_the_printed_bound_of_a_real_layer_but_not_the_corrected_one() -> None:
    """With the printed exponents as the bound, `exceeded` would not be 0 here."""
    first, second, third = drifting(0, (1, 16, 8), 3, 0.999)
    jumped = 0.8 * first + 0.4 * third  # not so far that it would be coded from zero
    inputs = [first, first + 1e-3 * second, *[first + 1e-3 * second] * 12, jumped]
    growth = grown(nn.Linear(8, 5), [x.float() for x in inputs], LayerConfig(activation=QuantizerConfig(bits=4)))
    (layer,) = growth["layers"]
    assert layer["compensated"]["error"][-1] > 10 * layer["compensated"]["printed_bound"][-1]
    assert growth["compensated"]["exceeded"] == 0
    assert growth["compensated"]["printed_exceeded"] > 0


def test_scale_energy_counts_each_scale_for_the_elements_that_share_it() -> None:
    codes = torch.zeros(2, 3, 4, dtype=torch.int8)
    rows = Code(((codes, QParams(torch.tensor([1.0, 2.0]).reshape(2, 1, 1), None)),), 1)
    assert float(scale_energy((rows,))) == 12 * 1.0 + 12 * 4.0


SHARES = st.floats(0.001, 0.99)
MOVES = st.lists(st.floats(0, 1e3), min_size=1, max_size=12)


@given(SHARES, MOVES)
def test_the_bounds_are_the_sums_of_their_formulas(c: float, moves: list[float]) -> None:
    """With the paper's descending indices: step i is t = T - i, d_k is the move at T - k."""
    bounds = zip(
        uncompensated_bound(c, moves), compensated_bound(c, moves),
        printed_bound(c, moves, compensated=False), printed_bound(c, moves, compensated=True), strict=True,
    )  # fmt: skip
    big_t = len(moves) + 1
    for step, values in enumerate(bounds, 1):
        t = big_t - step
        move = {k: moves[big_t - k - 1] for k in range(t, big_t)}.items()
        expected = (
            math.sqrt(c) * sum(d for _, d in move),
            sum(c ** ((k - t + 1) / 2) * d for k, d in move),
            math.sqrt(sum(2 ** (big_t - k - 1) * c * d**2 for k, d in move)),
            math.sqrt(sum((2 * c) ** (big_t - k - 1) * d**2 for k, d in move)),
        )
        assert values == pytest.approx(expected, rel=1e-9, abs=1e-9)
