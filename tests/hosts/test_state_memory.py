"""The memory of states: known before the first run, warned of, and a budget for it."""

import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError, ModiffWarning, presets
from modiff.hosts.host import Host
from modiff.model import trajectory as module
from tests.hosts.tiny import HOSTS

NETWORK = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])


@pytest.mark.parametrize(
    ("host", "modulation"),
    [("ddim", {}), ("ddim", {"predictor": "linear"}), ("ddpm", {"state_dtype": "float64"}), ("dit", {})],
)
def test_apply_tells_the_bytes_that_a_generation_then_takes(host: str, modulation: dict[str, str]) -> None:
    pipe, calls = HOSTS[host].build(), []
    handle = HOSTS[host].network(pipe).register_forward_pre_hook(lambda *_: calls.append(1))
    expected = modiff.apply(pipe, presets.as_config({"layer": {"modulation": modulation}})).memory.expected
    assert not calls  # hooks do not hear of the evaluation that tells the shapes
    handle.remove()
    HOSTS[host].call(pipe, steps=3)
    assert modiff.report(pipe).memory.states == expected > 0


@pytest.mark.parametrize("host", ["sd", "sdxl", "pixart", "sd3"])
def test_models_that_read_text_are_known_too_and_others_after_a_trajectory(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = modiff.apply(HOSTS[host].build(), "w8a4").memory
    assert memory.expected > 10**5
    assert "for one generation" in str(memory)
    monkeypatch.setattr(Host, "example", lambda *_: torch.zeros(-1))  # whatever it raises, a model is applied to
    assert "states known after a trajectory" in str(modiff.apply(NETWORK, "w8a4").memory)
    modiff.remove(NETWORK)


def test_states_beyond_what_is_free_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free", lambda device: 1000)
    monkeypatch.setattr("modiff.errors._WARNED", set())
    with pytest.warns(ModiffWarning, match=r"got about 0\.0 GiB for one generation of UNet2DModel.*state_memory"):
        modiff.apply(HOSTS["ddim"].build(), "w8a4")


def test_a_budget_keeps_the_smallest_states_and_the_report_says_which_layers_run_plain() -> None:
    pipe = HOSTS["ddim"].build()
    report = modiff.apply(pipe, "w8a4", state_memory="100KiB")
    plain = {e.setting: e.reason for e in report.taken if e.config.modulation is None}
    assert plain == {"W8A8 plain": "plain: its states do not fit into state_memory='100KiB'"}
    HOSTS["ddim"].call(pipe, steps=3)
    assert 50 * 1024 < modiff.report(pipe).memory.states == report.memory.expected <= 100 * 1024
    modiff.remove(pipe)
    assert not [e for e in modiff.apply(pipe, "w8a4", state_memory=10**9).taken if e.config.modulation is None]
    with pytest.raises(ConfigError, match="state_memory: expected networks of known input sizes, got 'Sequential'"):
        modiff.apply(NETWORK, "w8a4", state_memory="1GiB")
