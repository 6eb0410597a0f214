"""The memory of states: known before the first run, warned of, and a budget for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError, ModiffWarning, ModulationConfig, presets
from modiff.model import trajectory as module
from tests.hosts.tiny import HOSTS


@pytest.mark.parametrize(
    ("host", "modulation"),
    [
        ("ddim", ModulationConfig()),
        ("ddim", ModulationConfig(predictor="linear")),
        ("ddpm", ModulationConfig(state_dtype="float64")),
        ("dit", ModulationConfig()),
    ],
)
def test_apply_tells_the_bytes_that_a_generation_then_takes(host: str, modulation: ModulationConfig) -> None:
    pipe = HOSTS[host].build()
    config = presets.as_config({"layer": {"modulation": modulation.to_dict()}})
    expected = modiff.apply(pipe, config).memory.expected
    HOSTS[host].call(pipe, steps=3)
    assert modiff.report(pipe).memory.states == expected > 0


@pytest.mark.parametrize("host", ["sd", "sdxl", "pixart", "sd3"])
def test_models_that_read_text_are_known_too_and_others_after_a_trajectory(host: str) -> None:
    report = modiff.apply(HOSTS[host].build(), "w8a4")
    assert report.memory.expected > 10**5
    assert "for one generation" in str(report.memory)
    plain = modiff.apply(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)), "w8a4")
    assert plain.memory.expected == 0
    assert "states known after a trajectory" in str(plain.memory)


def test_states_beyond_what_is_free_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free", lambda device: 1000)
    monkeypatch.setattr("modiff.errors._WARNED", set())
    with pytest.warns(ModiffWarning, match=r"got about 0\.0 GiB for one generation of UNet2DModel.*state_memory"):
        modiff.apply(HOSTS["ddim"].build(), "w8a4")
    assert module._free(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is not None


def test_a_budget_keeps_the_smallest_states_and_the_report_says_which_layers_run_plain() -> None:
    pipe = HOSTS["ddim"].build()
    whole = modiff.select(pipe, "w8a4")
    report = modiff.apply(pipe, "w8a4", state_memory="100KiB")
    plain = {e.name: e.reason for e in report.taken if e.config.modulation is None}
    assert 0 < len(plain) < len(report.taken) == len(whole.taken)
    assert set(plain.values()) == {"plain: its states do not fit into state_memory='100KiB'"}
    HOSTS["ddim"].call(pipe, steps=3)
    assert 50 * 1024 < modiff.report(pipe).memory.states == report.memory.expected <= 100 * 1024
    modiff.remove(pipe)
    assert modiff.apply(pipe, "w8a4", state_memory=10**9).taken == modiff.apply(HOSTS["ddim"].build(), "w8a4").taken
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(ConfigError, match="state_memory: expected networks of known input sizes, got 'Sequential'"):
        modiff.apply(network, "w8a4", state_memory="1GiB")
