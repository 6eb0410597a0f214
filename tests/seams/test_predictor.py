"""A predictor from outside of the package: quadratic extrapolation."""

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import ConfigError, LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig
from modiff.model.trajectory import state_bytes
from tests.helpers import assert_within
from tests.recipes import state_of


class Quadratic:
    """p_t = 3 x_{t+1} - 3 x_{t+2} + x_{t+3} = x_{t+1} + 2 (x_{t+1} - x_{t+2}) - (x_{t+2} - x_{t+3})."""

    past_states = 3

    def weights(self, moves, gain, ratio):
        return ((), (1.0,), (2.0, -1.0))[moves]


modiff.register_predictor("quadratic", Quadratic())


def config(predictor: str, execution: str = "simulated") -> ModiffConfig:
    activation, modulation = QuantizerConfig(granularity="tensor"), ModulationConfig(predictor=predictor)
    layer = LayerConfig(activation=activation, modulation=modulation, execution=execution)
    return ModiffConfig(layer=layer, min_weights=0, first_last="quantize")


def parabola(steps: int) -> list[Tensor]:
    start, slope, bend = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    return [start + 0.1 * t * slope + 0.03 * t * t * bend for t in range(steps)]


def model(predictor: str, execution: str = "simulated") -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 8))
    modiff.apply(network, config(predictor, execution))
    return network


def error(predictor: str) -> float:
    network = model(predictor)
    with torch.no_grad(), modiff.trajectory(network):
        for x in parabola(9):
            network(x)
        return float((state_of(network[0]).input - x).abs().max())


def test_it_follows_a_parabola_which_the_others_lag():
    assert error("quadratic") < error("linear") / 100
    assert error("linear") < error("hold") / 2


def test_the_law_holds_and_it_keeps_two_moves():
    network = model("quadratic")
    layer = network[0]
    with torch.no_grad(), modiff.trajectory(network):
        for step, x in enumerate(parabola(6)):
            output = network(x)
            if step == 0:
                anchor = layer.operator.anchor(x) - layer.operator.affine(x)
            assert_within(output, layer.operator.affine(state_of(layer).input) + anchor, 1e-5)
        assert len(layer.loop.tensors()) == 6
        assert state_bytes(network) == 3 * 4 * (2 * 16 + 2 * 8)


def test_integers_refuse_it_and_say_so():
    layer = model("quadratic", "integer")[0]
    assert (layer.on_integers, layer.unsupported) == (False, "no kernel knows the predictor 'quadratic'")


def test_its_name_survives_json_and_unknown_and_taken_ones_are_refused():
    assert ModiffConfig.from_json(config("quadratic").to_json()) == config("quadratic")
    with pytest.raises(ConfigError, match=r"expected one of 'hold', 'linear'.*got 'cubic'.*register_predictor"):
        ModulationConfig(predictor="cubic")
    with pytest.raises(ConfigError, match="expected a new name, got 'linear'"):
        modiff.register_predictor("linear", Quadratic())
