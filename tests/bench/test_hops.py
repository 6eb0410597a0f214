"""The road of a steady step stays short: calls and files of one layer of the embedded model."""

from __future__ import annotations

import pytest

import hops
import modiff
from modiff.kernels import native
from modiff.kernels.isa import detect


def test_a_simulated_step_takes_few_calls_in_few_files() -> None:
    found = hops.hops(modiff.presets.modulated(8, 8))
    assert found.calls <= 40
    assert found.files <= 12
    assert found.kernels == 0


def test_a_step_on_integers_takes_few_calls_in_few_files() -> None:
    if native.find_compiler() is None or not detect().onednn:
        pytest.skip("other machines have other backends")
    found = hops.hops(modiff.presets.modulated(8, 8).on_integers())
    assert found.calls <= 45
    assert found.files <= 15
    assert 0 < found.kernels < found.calls
