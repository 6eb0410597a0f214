"""The road of a steady step stays short: calls and files of one layer of the embedded model."""

import gc
from functools import partial

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


def test_finalizers_of_garbage_are_not_counted(request):
    def on_collection(*_: object) -> None: ...

    request.addfinalizer(partial(gc.set_threshold, *gc.get_threshold()))
    request.addfinalizer(lambda: gc.callbacks.remove(on_collection))
    gc.callbacks.append(on_collection)
    gc.set_threshold(1, 1000, 1000)
    assert __file__ not in hops.profile(modiff.presets.modulated(8, 8))[0].everywhere
    assert gc.isenabled()
