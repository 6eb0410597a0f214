"""Autotune on pipelines: what it samples with, and the file of times."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError
from modiff.errors import FormatError
from modiff.kernels.isa import machine
from tests.hosts.tiny import SMALL


def timed(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    monkeypatch.setattr("modiff.model.autotune.measure_layer", lambda *_: seconds)


def test_a_tuned_pipeline_samples_and_the_same_file_gives_the_same_config(tmp_path, monkeypatch):
    timed(monkeypatch, float=3.0, plain=1.0, modulated=2.0)
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"another": {"layers": {}}}))  # times of another machine
    pipe = SMALL.build()
    result = modiff.autotune(pipe, tolerance=0.5, steps=3, profile=profile)
    times = json.loads(profile.read_text())
    assert set(times) == {"another", machine()}
    assert times["another"]["layers"] == {}
    assert all(set(row) == {"float", "plain", "modulated"} for row in times[machine()]["layers"].values())
    assert modiff.autotune(pipe, tolerance=0.5, steps=3, profile=profile) == result
    assert result.pays
    modiff.apply(pipe, result.config)
    assert torch.isfinite(SMALL.call(pipe)).all()


def test_where_nothing_pays_there_is_nothing_to_apply(monkeypatch):
    timed(monkeypatch, float=1.0, plain=2.0, modulated=2.0)
    pipe = SMALL.build()
    result = modiff.autotune(pipe, steps=2, tolerance=0.9)
    assert not result.pays
    with pytest.raises(ConfigError, match="expected at least one layer to take, got none"):
        modiff.apply(pipe, result.config)


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '{"MACHINE": {"layers": {"a": {"float": 1.0}}}}'])
def test_a_file_that_is_no_profile_is_refused_and_survives(tmp_path, text):
    profile, text = tmp_path / "profile.json", text.replace("MACHINE", machine())
    profile.write_text(text)
    with pytest.raises(FormatError, match="expected a profile that modiff wrote"):
        modiff.autotune(SMALL.build(), steps=2, profile=profile)
    assert profile.read_text() == text


def test_a_module_alone_needs_a_trajectory():
    with pytest.raises(ConfigError, match="Linear: expected run="):
        modiff.autotune(nn.Linear(2, 2))
