"""Methods by name: which settings a name stands for, and what is refused with which reason."""

from __future__ import annotations

import dataclasses

import pytest

from modiff import ConfigError, ModulationConfig
from modiff import methods as package
from modiff.methods import METHODS, Ptq4dmConfig, method_config
from modiff.methods.registry import name_of


def test_settings_come_from_the_paper_or_are_quick_then_from_the_file_then_from_the_options():
    config = method_config("ptq4dm", values={"samples": 64, "mean": 0.5}, changes={"samples": 32, "weight_bits": 4})
    assert config == Ptq4dmConfig(samples=32, mean=0.5, weight_bits=4)
    quick = package.QDiffusionConfig.quick()
    learning = dataclasses.replace(quick.learning, iterations=7)  # the other settings inside stay as they are
    assert method_config("q-diffusion", quick=True, values={"learning": {"iterations": 7}}) == dataclasses.replace(
        quick, learning=learning
    )


def test_modulation_is_switched_on_once_and_a_setting_of_it_stays():
    assert method_config("tfmq_dm", modulated=True).modulation == ModulationConfig()
    own = {"modulation": {"reanchor_every": 7}}
    for modulated in (True, None):
        assert method_config("ptq4dm", values=own, modulated=modulated).modulation == ModulationConfig(reanchor_every=7)
    assert method_config("ptq4dm", values=own, modulated=False).modulation is None
    assert method_config("modiff", modulated=True) == package.ModiffMethodConfig()
    assert method_config("accuquant", modulated=False) == package.AccuquantConfig()


def test_each_method_has_the_name_of_its_function_and_its_settings_name_it():
    assert set(METHODS) == {"q_diffusion", "ptq4dm", "tfmq_dm", "accuquant", "modiff"}
    for name, method in METHODS.items():
        assert method.recipe.__name__ == name == name_of(method.config.quick())
        assert getattr(package, method.config.__name__) is method.config


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "brecq"}, "method: expected one of .*, got 'brecq'"),
        ({"name": "accuquant", "modulated": True}, "accuquant: expected no modulation, got it. It learns scales of wh"),
        ({"name": "modiff", "modulated": False}, "modiff: expected modulation, got none. MoDiff is modulation"),
        ({"name": "ptq4dm", "values": {"sample": 3}}, "Ptq4dmConfig: expected a known field, got 'sample'"),
        ({"name": "ptq4dm", "changes": {"groups": 3}}, "Ptq4dmConfig: expected a known field, got 'groups'"),
        ({"name": "ptq4dm", "changes": {"weight_bits": 9}}, r"Ptq4dmConfig\.weight_bits: expected None or 2 to 8"),
    ],
)
def test_what_does_not_exist_or_means_nothing_is_refused_with_the_reason(call, message):
    with pytest.raises(ConfigError, match=message):
        method_config(**call)
