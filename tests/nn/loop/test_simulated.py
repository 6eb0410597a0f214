"""Shared residuals: who reads one tensor is told by object, read number or bytes; whoever misses an update is told."""

from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from modiff import LayerConfig, ModulationConfig, QuantizerConfig, StateError
from modiff.core import quantizer, recursion
from modiff.kernels import native
from modiff.nn import operator
from modiff.nn.loop import simulated, source
from modiff.nn.loop.source import Source
from tests.helpers import drifting
from tests.nn.building import group_of, same_bits, step
from tests.recipes import state_of

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="bytes are compared by a compiled loop")


def itself(x: Tensor) -> Tensor:
    return x


def view(x: Tensor) -> Tensor:
    return x.view(3, 4)


def written_by_a_kernel(x: Tensor) -> Tensor:
    x.numpy()[...] += 1  # no version counts it
    return x


# In eager execution (None) the object and its version tell; 0 is a graph without a number: bytes, and at the start the
# address; a number tells whatever the object is, negative for the first that reads it in each run of a graph.
READERS: list[tuple[bool, int | None, Callable[[Tensor], Tensor], int | None, bool, bool]] = [
    # inference tensor, first read, what comes of x, next read, begins, carries
    (False, None, itself, None, True, True),
    (False, None, torch.clone, None, False, False),
    (False, None, view, None, False, False),
    (False, None, Tensor.neg_, None, False, False),
    (False, 0, written_by_a_kernel, 0, False, False),
    (True, None, view, None, True, True),
    (True, None, torch.clone, None, False, True),
    (True, None, Tensor.neg_, None, False, False),
    (True, 0, view, 0, True, True),
    (True, 0, torch.clone, 0, False, True),
    (True, 0, Tensor.neg_, 0, False, False),
    (False, -7, view, 7, True, True),
    (False, -7, itself, 8, False, False),
    (False, -7, itself, -7, False, True),
    *[(False, first, itself, then, False, False) for first in (None, 0, 7, -7) for then in (None, 0, 7, -7)
      if (first is None) != (then is None) or (first == 0) != (then == 0)],
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(("inference", "first", "change", "then", "begins", "carries"), READERS)
def test_who_reads_one_tensor_is_told(inference, first, change, then, begins, carries):
    with torch.inference_mode(inference):
        x = torch.randn(3, 4)
        source = Source(x, first, True, "group")
        other = change(x)
        assert source.begins(other, then) == begins
        assert source.carries(other, then) == carries


@needs_compiler
@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_that_is_gone_is_not_the_next_one_in_its_memory(inference):
    with torch.inference_mode(inference):
        x = torch.randn(3, 4)
        source, again = Source(x, None, True, "group"), x[:]
        del x
        assert not source.begins(again, None)


@pytest.mark.parametrize("read", [None, 0])
def test_where_nobody_can_tell_nothing_is_shared(monkeypatch, read):
    with torch.inference_mode():
        x = torch.randn(3, 4)
    monkeypatch.setattr(source, "fingerprint", lambda _: None)
    assert not Source(x, read, True, "group").begins(x, read)
    assert not Source(x, read, True, "group").carries(x, read)


@needs_compiler
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "modulated", [ModulationConfig(), ModulationConfig(predictor="linear", first_step="coded", rounds=2)]
)
def test_layers_of_a_group_encode_one_tensor_once_and_give_what_they_would_alone(monkeypatch, modulated, mode):
    """All three read one tensor, or the last two another one."""
    monkeypatch.setattr(simulated, "encode", encode := Mock(wraps=recursion.encode))
    config = LayerConfig(activation=QuantizerConfig(bits=4), modulation=modulated)
    for several in (False, True):
        results = []
        for shared in (True, False):
            encode.reset_mock()
            clock, layers = group_of(3, shared=shared, config=config)
            clock.start()
            with mode():
                pairs = zip(*(drifting(seed, (2, 8), 5, 0.1, torch.float32) for seed in (0, 1)), strict=True)
                walks = [(x.clone(), y.clone()) for x, y in pairs]
                results.append([step(clock, layers, *((x, y, y) if several else (x,))) for x, y in walks])
            assert encode.call_count == 5 * (1 + several if shared else 3)
            assert len({state_of(layer).input.data_ptr() for layer in layers}) == (1 + several if shared else 3)
        same_bits(*results)


def test_a_member_that_was_skipped_says_so_unless_the_states_start_again():
    x, y, z = drifting(0, (2, 8), 3, 0.1, torch.float32)
    for every in (0, 2):
        clock, layers = group_of(2, shared=True, config=LayerConfig(modulation=ModulationConfig(reanchor_every=every)))
        clock.start()
        step(clock, layers, x)
        step(clock, layers[:1], y)
        if every == 0:
            with pytest.raises(StateError, match=r"to_k: expected update 2 of its .* 3.*share_residuals='off'"):
                step(clock, layers, z)
    late = step(clock, layers, z)
    clock, layers = group_of(2, shared=False, config=LayerConfig())
    clock.start()
    same_bits([late], [step(clock, layers, z)])


IN_PLACE: Callable[[Tensor], Tensor] = lambda x: x.mul_(2)  # noqa: E731


@needs_compiler
@pytest.mark.parametrize(("mode", "change"), [(torch.no_grad, torch.clone), (torch.no_grad, IN_PLACE),
                                              (torch.inference_mode, IN_PLACE)])  # fmt: skip
def test_members_that_no_longer_read_one_tensor_open_states_of_their_own_or_are_told(mode, change):
    with mode():
        clock, layers = group_of(2, shared=True)
        first, second = (x.clone() for x in drifting(0, (2, 8), 2, 0.1, torch.float32))
        clock.start()
        clock.call(None)
        layers[0](x := first.clone())
        layers[1](change(x))
        assert len({state_of(layer).input.data_ptr() for layer in layers}) == 2
        clock.stop()
        clock.start()
        step(clock, layers, first)
        clock.call(None)
        layers[0](second)
        with pytest.raises(StateError, match="to_k: expected the tensor that its group read before, got another one"):
            layers[1](change(second))


def test_rotation_and_dequantization_run_once_for_a_group_and_codes_are_freed_when_the_last_has_read_them(monkeypatch):
    config = LayerConfig(activation=QuantizerConfig(bits=4), rotation="hadamard")
    clock, layers = group_of(3, shared=True, config=config)
    clock.start()
    first, second = drifting(0, (2, 8), 2, 0.1, torch.float32)
    step(clock, layers, first)
    for module, name in ((operator, "rotate"), (quantizer, "dequantize")):
        monkeypatch.setattr(module, name, Mock(wraps=getattr(module, name)))
    clock.call(None)
    state = layers[0].loop.memories["default", 0].input
    for layer in layers:
        layer(second)
        assert (state.update is None) == (layer is layers[2])
    assert (operator.rotate.call_count, quantizer.dequantize.call_count) == (1, 1)
