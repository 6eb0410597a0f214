"""Selection: every layer has an entry, every layer left a reason, every pattern that matches nothing is an error."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import modiff
from modiff import ConfigError, LayerConfig, ModiffConfig, QuantizerConfig
from tests.model.toys import TAKEN, applied, toy


def reasons(model: nn.Module, config: ModiffConfig) -> dict[str, str]:
    return {e.name: e.reason for e in modiff.select(model, config).entries}


def taken(model: nn.Module, config: ModiffConfig) -> tuple[str, ...]:
    return tuple(e.name for e in modiff.select(model, config).taken)


def test_the_defaults_leave_the_ends_the_time_embedding_and_tiny_layers():
    assert reasons(toy(), ModiffConfig()) == {
        "conv_in": "first or last layer (as forward is written)",
        "time_embedding": "excluded by '*time_*emb*'",
        "body": "",
        "attention.to_q": "",
        "attention.to_k": "",
        "attention.to_v": "",
        "attention.to_out.0": "",
        "tiny": "tiny: 32 weights",
        "back": "Clamped computes something else than its own linear map of its input",
        "conv_out": "first or last layer (as forward is written)",
    }


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (ModiffConfig(include=("body", "attention.to_q"), exclude=("*to_q",)), ("body",)),
        (ModiffConfig(exclude=("body",), default_exclude=()), ("time_embedding", *TAKEN[1:])),
        (ModiffConfig(min_weights=0), (*TAKEN, "tiny")),
        (ModiffConfig(first_last="quantize"), ("conv_in", *TAKEN, "conv_out")),
        (ModiffConfig(include=("conv_in", "tiny", "body")), ("conv_in", "body", "tiny")),
        (ModiffConfig(overrides=(("conv_in", LayerConfig()),)), ("conv_in", *TAKEN)),
    ],
)
def test_patterns_limits_and_names_choose(config, names):
    assert taken(toy(), config) == names


def test_the_last_override_that_matches_wins():
    four, three = (LayerConfig(activation=QuantizerConfig(bits=b)) for b in (4, 3))
    config = ModiffConfig(overrides=(("attention.*", four), ("*to_k", three), ("bo*", three)))
    bits = {e.name: e.config.activation.bits for e in modiff.select(toy(), config).taken}
    assert bits == dict(zip(TAKEN, (3, 4, 3, 4, 4), strict=True))


@pytest.mark.parametrize("field", ["include", "exclude", "overrides"])
def test_a_pattern_that_matches_no_layer_is_an_error_that_names_some(field):
    value = (("atention.*", LayerConfig()),) if field == "overrides" else ("body", "atention.*")
    with pytest.raises(ConfigError, match=rf"ModiffConfig\.{field}: expected a .* got 'atention\.\*'.*conv_in, time"):
        modiff.select(toy(), ModiffConfig(**{field: value}))


def test_nothing_to_take_is_an_error_that_shows_why():
    with pytest.raises(ConfigError, match=r"(?s)Toy: expected at least one layer to take, got none of 10.*tiny: 32"):
        modiff.select(toy(), ModiffConfig(min_weights=10**6))
    with pytest.raises(ConfigError, match="ReLU: expected at least one layer to take, got none of 0"):
        modiff.select(nn.ReLU(), ModiffConfig())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_weight_is_an_error_unless_its_layer_is_left(value):
    model = toy()
    model.body.weight.data[3, 2, 1, 0] = value
    with pytest.raises(ConfigError, match="body: expected finite weights, got NaN or infinity"):
        modiff.select(model, ModiffConfig())
    assert taken(model, ModiffConfig(exclude=("body",))) == TAKEN[1:]


def test_layers_that_cannot_be_taken_say_why():
    model = applied(ModiffConfig(include=("attention.to_q",)))
    model.attention.to_v.forward = lambda x: x
    weight_norm(model.attention.to_k)
    model.body.weight = nn.Parameter(torch.zeros(16, 16, 3, 3, dtype=torch.int8), requires_grad=False)
    found, modules = reasons(model, ModiffConfig()), dict(model.named_modules())
    assert found["attention.to_q"] == "taken by modiff already"
    assert found["attention.to_v"] == "another library replaced its forward"
    assert found["attention.to_k"] == "", "its weight norm is evaluated once"
    assert found["body"] == "weight is torch.int8, not floating point"
    assert dict(model.named_modules()) == modules, "selecting changes nothing"


def test_scales_that_no_integer_matmul_can_run_are_marked():
    def notes(granularity: str) -> dict[str, str]:
        return reasons(toy(), ModiffConfig(layer=LayerConfig(activation=QuantizerConfig(granularity=granularity))))

    mark = "scales: not executable on integers, for study only"
    assert notes("input_channel")["attention.to_q"] == f"input_channel {mark}"
    assert (notes("token")["body"], notes("token")["attention.to_q"]) == (f"token {mark}", "")
    assert notes("sample")["body"] == notes("auto")["body"] == ""


def test_a_layer_itself_is_refused_and_stays_what_it_was():
    layer = nn.Linear(64, 64)
    with pytest.raises(ConfigError, match=r"expected a network with layers inside, got a Linear itself.*Sequential"):
        modiff.apply(layer, ModiffConfig(first_last="quantize"))
    assert list(layer.children()) == []


def test_a_layer_without_its_weight_yet_is_refused_and_what_torch_scripted_is_left():
    inside = [nn.Linear(64, 64), nn.LazyLinear(64), nn.Linear(64, 64), nn.Linear(64, 64)]
    with pytest.raises(ConfigError, match=r"1: expected a layer with a weight, got 'LazyLinear'.*the network once"):
        modiff.select(nn.Sequential(*inside), "w8a8")
    with pytest.warns(DeprecationWarning, match="script"):
        inside[1] = torch.jit.script(nn.Sequential(nn.Linear(64, 64)))
    reasons = {entry.name: entry.reason for entry in modiff.select(nn.Sequential(*inside), "w8a8").left}
    assert reasons["1.0.weight"] == "no layer of its own"


def test_a_layer_in_two_places_is_left_and_the_report_says_so():
    shared = nn.Linear(64, 64)
    model = nn.Sequential(nn.Linear(64, 64), shared, nn.SiLU(), shared, nn.Linear(64, 64))
    assert reasons(model, ModiffConfig(first_last="quantize"))["1"] == "is 3 too"
    assert taken(model, ModiffConfig(first_last="quantize")) == ("0", "4")
