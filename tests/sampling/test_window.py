"""Modulation along the rows of one call: the recursion over rows, and nothing left when the call ends."""

import dataclasses
import threading

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import ConfigError, LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, StateError, WeightConfig
from modiff.core.affine import QParams
from modiff.core.quantizer import Code
from modiff.model.attach import required_attachment
from modiff.model.trajectory import state_bytes
from modiff.sampling.parallel import rows_of, spread
from modiff.sampling.window import along_window
from tests.helpers import assert_same_bits, assert_within, relative_error
from tests.nn.building import drawn
from tests.recipes import float64, play, quantized, recipe_of_layer
from tests.reference.recursion import run

W4A4 = LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=4))
TIMES = torch.arange(9, 0, -1)


def bits(count: int, **settings) -> LayerConfig:
    return dataclasses.replace(W4A4, activation=QuantizerConfig(bits=count, **settings))


def loop(**settings) -> LayerConfig:
    return dataclasses.replace(W4A4, modulation=ModulationConfig(**settings))


CONFIGS = {
    "4 bits": W4A4,
    "8 bits": bits(8),
    "0 bits": bits(0),
    "a scale for the tensor": bits(4, granularity="tensor"),
    "scales for three rows": bits(4, refresh_every=3),
    "rotated": dataclasses.replace(W4A4, rotation="hadamard"),
    "coded anchor": loop(first_step="coded", rounds=2),
    "anchor with quantized weights": loop(anchor_weights="quantized"),
    "anchors every third row": loop(reanchor_every=3),
    "errors are not sent": loop(error_compensation="none"),
}
KINDS = ["linear", "conv", "conv in groups", "conv along one axis"]


class Network(nn.Module):
    """One layer that has a timestep, as U-Nets do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x)


def network(layer: nn.Module, config: LayerConfig) -> Network:
    model = Network(layer)
    modiff.apply(model, ModiffConfig(layer=config, first_last="quantize", min_weights=0))
    return model


def in_one_call(model: Network, rows: list[Tensor]) -> list[Tensor]:
    with along_window(model):
        output = rows_of(model)(torch.stack(rows, 1), TIMES[: len(rows)])
    return list(output.unbind(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_rows_of_a_call_are_the_steps_of_a_trajectory(name: str, kind: str) -> None:
    layer, rows, _ = drawn(kind, 7, torch.float64)
    config = float64(CONFIGS[name])
    steps = play(quantized(layer, config), rows)
    outputs = in_one_call(network(layer, config), rows)
    for output, (expected, *_) in zip(outputs, steps, strict=True):
        assert_within(output, expected, 1e-12)
    if "refresh" not in str(config.activation) or config.activation.refresh_every == 1:
        for output, step in zip(outputs, run(rows, recipe_of_layer(layer, config)), strict=True):
            assert_within(output, step.output_state, 1e-12)


def test_every_row_obeys_the_law_also_where_a_sample_jumps() -> None:
    layer, rows, _ = drawn("linear", 6, torch.float64)
    rows[3] = torch.cat([30 * torch.flip(rows[3][:1], (-1,)), rows[3][1:]])
    config = float64(W4A4)
    model, steps = network(layer, config), run(rows, recipe_of_layer(layer, config))
    outputs, ours = in_one_call(model, rows), required_attachment(model, "test").layers["layer"]
    rounded = ours.quantized_weight.dense(ours.weight, torch.float64)
    for j, (output, step) in enumerate(zip(outputs, steps, strict=True)):
        anchor = rows[0].clone()
        anchor[0] *= j < 3  # predicted as zero since: that sample's states start from its codes
        law = step.input_state @ rounded.T + anchor @ (layer.weight - rounded).T + layer.bias
        assert_within(output, law.detach(), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_is_the_anchor(kind: str) -> None:
    layer, rows, _ = drawn(kind, 1)
    assert_same_bits(in_one_call(network(layer, W4A4), rows)[0], layer(rows[0]).detach())


class Exact:
    """A quantizer of infinitely many bits."""

    config, finds_jumps, unsent = QuantizerConfig(), False, 0.0
    of_values = ()

    def __call__(self, residual: Tensor) -> Code:
        return Code(((residual, QParams(torch.ones((), dtype=residual.dtype), None)),), -1)


@pytest.mark.parametrize("kind", KINDS)
def test_infinitely_many_bits_are_full_precision(kind: str) -> None:
    layer, rows, _ = drawn(kind, 5, torch.float64)
    model = network(layer, float64(dataclasses.replace(W4A4, weight=WeightConfig(bits=None))))
    required_attachment(model, "test").layers["layer"].loop.quantizer = Exact()
    for output, row in zip(in_one_call(model, rows), rows, strict=True):
        assert_within(output, layer(row).detach(), 1e-12)


@pytest.mark.parametrize("execution", ["simulated", "integer"])
def test_nothing_is_kept_and_trajectories_go_on_as_before(execution: str) -> None:
    layer, rows, _ = drawn("conv", 4)
    modulation = ModulationConfig(state_dtype="float32")  # not the int16 states of integers, which rows do not have
    model = network(layer, dataclasses.replace(W4A4, execution=execution, modulation=modulation))

    def trajectory() -> list[Tensor]:
        with modiff.trajectory(model):
            return [model(x, t) for x, t in zip(rows, TIMES, strict=False)]

    before = trajectory()
    with modiff.trajectory(model):
        first, second = in_one_call(model, rows), in_one_call(model, rows)
        assert state_bytes(model) == 0
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other)
    for one, other in zip(before, trajectory(), strict=True):
        assert_same_bits(one, other)
    assert max(relative_error(one, other) for one, other in zip(first, before, strict=True)) < 1e-5


def test_plain_layers_stay_as_they_are() -> None:
    layer, rows, _ = drawn("linear", 3)
    model = network(layer, dataclasses.replace(W4A4, modulation=None))
    outputs = in_one_call(model, rows)
    for output, row in zip(outputs, rows, strict=True):
        assert_within(output, model(row, TIMES[:1]), 1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            loop(predictor="linear"),
            r"along_window: layer: predictor: expected 'hold', got 'linear'.*='hold'",
        ),
        (bits(4, dynamic=False, step_groups=0), r"layer: step_groups: expected 1 set of scales, got 0. .*dynamic=True"),
    ],
)
def test_what_looks_at_steps_is_refused(config: LayerConfig, message: str) -> None:
    model = network(drawn("linear")[0], config)
    with pytest.raises(ConfigError, match=message), along_window(model):
        pass


def test_networks_that_nothing_gives_rows_to_are_refused() -> None:
    layer, rows, _ = drawn("linear", 3)
    with pytest.raises(StateError, match="along_window: expected a model with modulated layers"), along_window(layer):
        pass
    model = network(layer, W4A4)
    with (
        along_window(model),
        pytest.raises(StateError, match=r"layer: expected known rows .*, got a batch of 2.*rows_of"),
    ):
        model(rows[0], TIMES[:1])
    halves = rows_of(lambda x, t: model(x[:-1], t))
    with along_window(model), pytest.raises(StateError, match="expected 3 rows for each sample, got a batch of 5"):
        halves(torch.stack(rows, 1), TIMES[:3])


def test_threads_may_share_a_network_along_the_window_as_no_call_leaves_a_state() -> None:
    layer, rows, _ = drawn("linear", 8)
    model, x, ready = network(layer, W4A4), torch.stack(rows, 1), threading.Barrier(2)

    def at_once(x: Tensor, times: Tensor) -> Tensor:
        ready.wait(30)
        return rows_of(model)(x, times)

    times = TIMES[: len(rows)]
    with along_window(model):
        alone = [rows_of(model)(*half) for half in zip(x.tensor_split(2, 1), times.tensor_split(2), strict=True)]
        assert_same_bits(spread([at_once, at_once])(x, times), torch.cat(alone, 1))
