"""Autotune on pipelines: what it samples with, and the file of times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError
from modiff.errors import FormatError
from modiff.kernels.isa import machine
from tests.hosts.tiny import HOSTS


@pytest.fixture
def slow_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every layer pays."""
    made_up = {"float": 3.0, "plain": 1.0, "modulated": 2.0}
    monkeypatch.setattr("modiff.model.autotune.measure_layer", lambda *_: made_up)


@pytest.mark.usefixtures("slow_floats")
def test_a_gated_pipeline_samples_and_the_same_file_gives_the_same_config(tmp_path: Path) -> None:
    host = HOSTS["ddim"]
    profile = tmp_path / "profile.json"
    pipe = host.build()
    found = modiff.autotune(pipe, tolerance=0.5, steps=3, profile=profile)
    kept = json.loads(profile.read_text())
    assert list(kept) == [machine()]
    assert all(set(row) == {"float", "plain", "modulated"} for row in kept[machine()]["layers"].values())
    assert modiff.autotune(pipe, tolerance=0.5, steps=3, profile=profile) == found
    assert found.pays
    modiff.apply(pipe, found.config)
    assert torch.isfinite(host.call(pipe)).all()


@pytest.mark.usefixtures("slow_floats")
def test_times_of_another_machine_are_kept_and_not_used(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"another": {"layers": {}}}))
    modiff.autotune(HOSTS["ddim"].build(), steps=2, profile=profile)
    assert set(json.loads(profile.read_text())) == {"another", machine()}


def test_where_nothing_pays_there_is_nothing_to_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "modiff.model.autotune.measure_layer", lambda *_: {"float": 1.0, "plain": 2.0, "modulated": 2.0}
    )
    pipe = HOSTS["ddim"].build()
    found = modiff.autotune(pipe, steps=2, tolerance=0.9)
    assert not found.pays
    with pytest.raises(ConfigError, match="expected at least one layer to take, got none"):
        modiff.apply(pipe, found.config)


@pytest.mark.parametrize(
    "text", ["[1]", "{", "[" * 100_000, '{"MACHINE": {"layers": 3}}', '{"MACHINE": {"layers": {"a": {"float": 1.0}}}}']
)
def test_a_file_that_is_no_profile_is_refused_and_survives(tmp_path: Path, text: str) -> None:
    profile, text = tmp_path / "profile.json", text.replace("MACHINE", machine())
    profile.write_text(text)
    with pytest.raises(FormatError, match="expected a profile that modiff wrote"):
        modiff.autotune(HOSTS["ddim"].build(), steps=2, profile=profile)
    assert profile.read_text() == text


def test_a_module_alone_needs_a_trajectory() -> None:
    with pytest.raises(ConfigError, match="Linear: expected run="):
        modiff.autotune(nn.Linear(2, 2))
