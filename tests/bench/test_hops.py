"""The road of a steady step stays short: calls and files of one layer of the embedded model."""

import pytest

import hops
import modiff
from modiff.kernels import native
from modiff.kernels.isa import detect


@pytest.mark.parametrize(("on_integers", "calls", "files"), [(False, 40, 12), (True, 45, 16)])
def test_a_step_takes_few_calls_in_few_files(on_integers, calls, files):
    if on_integers and (native.find_compiler() is None or not detect().onednn):
        pytest.skip("other machines have other backends")
    config = modiff.presets.modulated(8, 8)
    found = hops.hops(config.on_integers() if on_integers else config)
    assert found.calls <= calls
    assert found.files <= files
    assert (found.kernels > 0) == on_integers
