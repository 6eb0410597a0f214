"""Methods by name: which settings a name stands for, what is refused with which reason, and whose folder it is."""

from __future__ import annotations

import dataclasses

import pytest

from modiff import ConfigError, ModulationConfig
from modiff import methods as package
from modiff.methods import Ptq4dmConfig
from modiff.methods.registry import METHODS, method_config, method_named, name_of


def test_settings_come_from_the_paper_then_the_file_then_the_options():
    config = method_config("ptq4dm", values={"samples": 64, "mean": 0.5}, changes={"samples": 32, "weight_bits": 4})
    assert config == Ptq4dmConfig(samples=32, mean=0.5, weight_bits=4)
    quick = method_config("q-diffusion", quick=True, values={"samples": 32})
    assert quick == dataclasses.replace(METHODS["q_diffusion"].quick(), samples=32)
    assert method_config("modiff") == package.ModiffMethodConfig()


def test_a_file_with_some_settings_of_a_part_leaves_the_others_of_that_part():
    quick = METHODS["q_diffusion"].quick()
    found = method_config("q_diffusion", quick=True, values={"reconstruction": {"iterations": 7}})
    assert found.reconstruction == dataclasses.replace(quick.reconstruction, iterations=7)
    learned = method_config("q_diffusion", quick=True, values={"learning": {"iterations": 7}})
    assert learned.learning == dataclasses.replace(quick.learning, iterations=7)


def test_modulation_is_switched_on_once_and_a_setting_of_it_stays():
    config = method_config("tfmq_dm", modulated=True)
    assert config.modulation == ModulationConfig()
    own = {"modulation": {"reanchor_every": 7}}
    assert method_config("ptq4dm", values=own, modulated=True).modulation == ModulationConfig(reanchor_every=7)
    assert method_config("ptq4dm", values=own, modulated=False).modulation is None
    assert method_config("ptq4dm", values=own).modulation is not None
    assert method_config("modiff", modulated=True) == package.ModiffMethodConfig()
    assert method_config("accuquant", modulated=False) == package.AccuquantConfig()


def test_each_method_has_the_name_of_its_function_and_its_settings_name_it():
    assert set(METHODS) == {"q_diffusion", "ptq4dm", "tfmq_dm", "accuquant", "modiff"}
    for name, method in METHODS.items():
        assert method.recipe.__name__ == name
        assert method.config.__name__ in package.__all__
        assert name_of(method.quick()) == name
    assert method_named("q-diffusion") is METHODS["q_diffusion"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "brecq"}, "method: expected one of .*, got 'brecq'"),
        ({"name": "accuquant", "modulated": True}, "accuquant: expected no modulation, got it. It learns scales of wh"),
        ({"name": "modiff", "modulated": False}, "modiff: expected modulation, got none. MoDiff is modulation"),
        ({"name": "ptq4dm", "values": {"sample": 3}}, "Ptq4dmConfig: expected a known field, got 'sample'"),
        ({"name": "ptq4dm", "changes": {"groups": 3}}, "ptq4dm: expected one of weight_bits, .*, got 'groups'"),
        ({"name": "ptq4dm", "changes": {"weight_bits": 9}}, r"Ptq4dmConfig\.weight_bits: expected None or 2 to 8"),
        ({"name": "accuquant", "changes": {"activation_bits": None}}, r"AccuquantConfig\.activation_bits"),
    ],
)
def test_what_does_not_exist_or_means_nothing_is_refused_with_the_reason(call, message):
    with pytest.raises(ConfigError, match=message):
        method_config(**call)
