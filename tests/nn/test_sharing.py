"""Shared residuals: who reads one tensor is told by object, read number or bytes; whoever misses an update is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modiff import LayerConfig, ModulationConfig, QuantizerConfig, StateError, WeightConfig
from modiff.core import quantizer, recursion
from modiff.kernels import native
from modiff.nn import Clock, ModulatedLayer, quantized_class, sharing
from modiff.nn.sharing import Source
from tests.helpers import assert_same_bits, drifting
from tests.recipes import play, quantized, randomised

CONFIG = LayerConfig(activation=QuantizerConfig(bits=4))
needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")


def inference(*shape: int) -> Tensor:
    with torch.inference_mode():
        return torch.randn(shape)


def knows(found: Source, x: Tensor, read: int | None = None) -> bool:
    """Both for a layer that begins and for one that goes on."""
    begins = found.begins(x, read)
    assert begins == found.carries(x, read)
    return begins


def test_in_eager_execution_the_object_and_its_version_tell():
    x = torch.randn(3, 4)
    found = Source(x, None, True)
    assert knows(found, x)
    assert not knows(found, x.clone())
    assert not knows(found, x[:])
    x.mul_(1.0)
    assert not knows(found, x)


def test_an_object_that_is_gone_is_nobody():
    x = torch.randn(3, 4)
    found = Source(x, None, True)
    del x
    assert not knows(found, torch.randn(3, 4))


@needs_compiler
@pytest.mark.parametrize("read", [None, 0])
def test_where_the_object_is_silent_bytes_tell_and_at_the_start_the_address(read):
    x = inference(3, 4)
    found = Source(x, read, True)
    assert knows(found, x, read)
    with torch.inference_mode():
        assert knows(found, x.view(3, 4), read)
        assert not found.begins(x.clone(), read)
        assert found.carries(x.clone(), read)
        x.neg_()
        assert not knows(found, x, read)


@needs_compiler
def test_a_temporary_that_is_gone_is_not_the_next_one_in_its_memory():
    x = inference(3, 4)
    found = Source(x, None, True)
    with torch.inference_mode():
        again = x[:]  # the memory and the bytes, but another tensor
        del x
        assert not found.begins(again, None)


@needs_compiler
def test_in_a_graph_a_version_says_nothing():
    x = torch.randn(3, 4)
    found = Source(x, 0, True)
    x.numpy()[...] += 1  # as a compiled kernel writes
    assert not knows(found, x, 0)


@pytest.mark.parametrize("read", [None, 0])
def test_where_nobody_can_tell_nothing_is_shared(monkeypatch, read):
    x = inference(3, 4)
    assert not knows(Source(x, read, False), x, read)
    monkeypatch.setattr(sharing, "fingerprint", lambda _: None)
    assert not knows(Source(x, read, True), x, read)


def test_a_read_number_of_a_graph_tells_whatever_the_object_is(monkeypatch):
    monkeypatch.setattr(sharing, "fingerprint", lambda _: pytest.fail("no pass over memory"))
    x = torch.randn(3, 4)
    found = Source(x, -7, True)
    assert knows(found, x.view(3, 4), 7)
    assert not knows(found, x, 8)
    assert not knows(found, x, None)
    assert not found.begins(x, -7)  # the first that reads it in another run of the graph
    assert found.carries(x, -7)


@pytest.mark.parametrize("read", [0, 7, -7])
def test_what_a_graph_reads_is_not_what_eager_execution_reads(read):
    x = torch.randn(3, 4)
    assert not knows(Source(x, None, True), x, read)
    assert not knows(Source(x, read, True), x, None)


@pytest.mark.parametrize("read", [0, 7, -7])
def test_what_has_a_number_is_not_what_has_none(read):
    x = torch.randn(3, 4)
    other = 0 if read else 7
    assert not knows(Source(x, read, True), x, other)


def test_bytes_are_looked_at_only_for_readers_that_will_ask(monkeypatch):
    seen: list[Tensor] = []
    monkeypatch.setattr(sharing, "fingerprint", seen.append)
    Source(torch.randn(3), 0, False)
    Source(torch.randn(3), None, True)
    Source(torch.randn(3), 7, True)
    assert not seen
    Source(x := torch.randn(3), 0, True)
    assert seen[0] is x


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that were coded, in order."""
    coded: list[Tensor] = []

    def counted(x, *rest):
        coded.append(x)
        return recursion.encode(x, *rest)

    monkeypatch.setattr(sharing, "encode", counted)
    return coded


def group_of(size: int, *, shared: bool, config: LayerConfig = CONFIG) -> tuple[Clock, list[ModulatedLayer]]:
    clock = Clock("model")
    floats = [randomised(nn.Linear(8, 3), seed) for seed in range(size)]
    layers = [
        quantized_class(f).from_float(f, config, name=f"to_{'qkv'[i]}", clock=clock) for i, f in enumerate(floats)
    ]
    if shared:
        for layer in layers[1:]:
            layer.share_with(layers[0])
    return clock, layers


def step(clock: Clock, layers: list[ModulatedLayer], *inputs: Tensor) -> list[Tensor]:
    """One evaluation; one input for all layers, or one for each."""
    clock.call(None)
    try:
        return [layer(x) for layer, x in zip(layers, inputs if len(inputs) > 1 else inputs * len(layers), strict=True)]
    finally:
        clock.returned()


@pytest.mark.parametrize(
    "modulated", [ModulationConfig(), ModulationConfig(predictor="linear", first_step="coded", rounds=2)]
)
def test_q_k_and_v_code_one_tensor_once_and_give_what_they_would_alone(encodes, modulated):
    config = LayerConfig(activation=QuantizerConfig(bits=4), modulation=modulated)
    inputs = drifting(0, (2, 8), 5, 0.1, torch.float32)
    results = {}
    for shared in (True, False):
        encodes.clear()
        clock, layers = group_of(3, shared=shared, config=config)
        clock.start()
        results[shared] = [step(clock, layers, x) for x in inputs]
        assert len(encodes) == (5 if shared else 15)
        assert len({layer.state.input.data_ptr() for layer in layers}) == (1 if shared else 3)
    for ours, alone in zip(results[True], results[False], strict=True):
        for a, b in zip(ours, alone, strict=True):
            assert_same_bits(a, b)


def test_layers_of_a_group_that_read_different_tensors_keep_states_of_their_own(encodes):
    a, b = drifting(0, (2, 8), 4, 0.1, torch.float32), drifting(1, (2, 8), 4, 0.1, torch.float32)
    clock, layers = group_of(3, shared=True)
    alone_clock, alone = group_of(3, shared=False)
    clock.start()
    alone_clock.start()
    for x, y in zip(a, b, strict=True):
        ours, theirs = step(clock, layers, x, y, y), step(alone_clock, alone, x, y, y)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_bits(mine, other)
    assert len(encodes) == 4 * (2 + 3)


def test_a_group_s_contexts_and_trajectories_do_not_mix():
    a, b = drifting(0, (2, 8), 3, 0.1, torch.float32), drifting(1, (2, 8), 3, 0.1, torch.float32)
    clock, layers = group_of(3, shared=True)
    expected = {}
    for name, inputs in (("cond", a), ("uncond", b)):
        clock.start()
        expected[name] = [step(clock, layers, x) for x in inputs]
        clock.stop()
    clock.start()
    for t in range(3):
        for name, inputs in (("cond", a), ("uncond", b)):
            clock.context = name
            for ours, theirs in zip(step(clock, layers, inputs[t]), expected[name][t], strict=True):
                assert_same_bits(ours, theirs)


def test_a_member_that_was_skipped_says_so_when_it_comes_back():
    clock, layers = group_of(3, shared=True)
    inputs = drifting(0, (2, 8), 3, 0.1, torch.float32)
    clock.start()
    step(clock, layers, inputs[0])
    step(clock, layers[:2], inputs[1])
    with pytest.raises(StateError, match=r"to_v: expected update 2 of its group, got update 3.*share_residuals='off'"):
        step(clock, layers, inputs[2])


def test_a_member_that_was_skipped_may_come_back_where_the_states_start_again():
    clock, layers = group_of(2, shared=True, config=LayerConfig(modulation=ModulationConfig(reanchor_every=2)))
    inputs = drifting(0, (2, 8), 3, 0.1, torch.float32)
    clock.start()
    step(clock, layers, inputs[0])
    step(clock, layers[:1], inputs[1])
    _, late = step(clock, layers, inputs[2])
    fresh_clock, fresh = group_of(2, shared=False, config=LayerConfig())
    fresh_clock.start()
    assert_same_bits(late, step(fresh_clock, fresh, inputs[2])[1])


def test_a_layer_alone_may_be_skipped():
    clock, layers = group_of(2, shared=False)
    inputs = drifting(0, (2, 8), 3, 0.1, torch.float32)
    clock.start()
    step(clock, layers, inputs[0])
    step(clock, layers[:1], inputs[1])
    _, late = step(clock, layers, inputs[2])
    other_clock, other = group_of(2, shared=False)
    other_clock.start()
    step(other_clock, other, inputs[0])
    assert_same_bits(late, step(other_clock, other, inputs[2])[1])


def test_members_that_no_longer_read_one_tensor_are_told():
    clock, layers = group_of(2, shared=True)
    first, second = drifting(0, (2, 8), 2, 0.1, torch.float32)
    clock.start()
    step(clock, layers, first)
    with pytest.raises(StateError, match="to_k: expected the tensor that its group read before, got another one"):
        step(clock, layers, second, second.clone())


def test_a_tensor_changed_in_place_between_two_readers_is_another_tensor():
    clock, layers = group_of(2, shared=True)
    first, second = drifting(0, (2, 8), 2, 0.1, torch.float32)
    clock.start()
    step(clock, layers, first)
    clock.call(None)
    layers[0](second)
    second.mul_(2.0)
    with pytest.raises(StateError, match="to_k: expected the tensor that its group read before, got another one"):
        layers[1](second)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_changed_in_place_before_the_states_start_opens_a_state_of_its_own(mode):
    with mode():
        x = drifting(0, (2, 8), 1, 0.1, torch.float32)[0]
        clock, layers = group_of(2, shared=True)
        clock.start()
        clock.call(None)
        layers[0](x)
        x.mul_(2.0)
        layers[1](x)
        assert_same_bits(layers[1].state.input, x)
        assert_same_bits(2 * layers[0].state.input, x)


def test_an_inference_tensor_changed_in_place_between_two_readers_is_another_tensor(encodes):
    if native.find_compiler() is None:
        pytest.skip("without a compiler inference tensors are not shared")
    with torch.inference_mode():
        clock, layers = group_of(2, shared=True)
        inputs = [x.clone() for x in drifting(0, (2, 8), 3, 0.1, torch.float32)]
        clock.start()
        for x in inputs[:2]:
            step(clock, layers, x)
        assert len(encodes) == 2
        clock.call(None)
        layers[0](inputs[2])
        inputs[2].mul_(2.0)
        with pytest.raises(StateError, match="to_k: expected the tensor that its group read before, got another one"):
            layers[1](inputs[2])


def test_anchors_come_at_every_multiple_of_the_interval():
    config = LayerConfig(modulation=ModulationConfig(reanchor_every=3), activation=QuantizerConfig(bits=2))
    inputs = drifting(0, (2, 8), 8, 0.1, torch.float32)
    steps = play(quantized(randomised(nn.Linear(8, 3)), config), inputs)
    exact = [torch.equal(state, x) for (_, state, _), x in zip(steps, inputs, strict=True)]
    assert exact == [True, False, False, True, False, False, True, False]


@pytest.mark.parametrize("shape", [(3, 8), (2, 2, 8)])
def test_a_shape_that_changes_inside_a_trajectory_is_refused(shape):
    clock, (layer, *_) = group_of(1, shared=False)
    clock.start()
    step(clock, [layer], torch.randn(2, 8))
    with pytest.raises(StateError, match=r"to_q: expected an input of shape \(2, 8\) on cpu, got \(\d, .*8\) on cpu"):
        step(clock, [layer], torch.randn(shape))


def test_the_states_of_a_shared_update_do_not_keep_the_input_alive():
    """A weak reference tells whether it is the same tensor: an address can be reused by another one."""
    clock, layers = group_of(2, shared=True)
    clock.start()
    first, second = drifting(0, (2, 8), 2, 0.1, torch.float32)
    step(clock, layers, first)
    clock.call(None)
    layers[0](second.clone())
    with pytest.raises(StateError, match="to_k: expected the tensor that its group read before, got another one"):
        layers[1](second)


def test_sharing_works_under_inference_mode():
    results = []
    for shared in (True, False):
        clock, layers = group_of(3, shared=shared, config=LayerConfig(weight=WeightConfig(bits=None)))
        clock.start()
        with torch.inference_mode():
            results.append([step(clock, layers, x.clone()) for x in drifting(0, (2, 8), 3, 0.1, torch.float32)])
    for ours, alone in zip(*results, strict=True):
        for a, b in zip(ours, alone, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("execution", ["simulated", "integer"])
@pytest.mark.parametrize(("every", "measured"), [(1, [1, 2, 3, 4, 5]), (2, [1, 1, 3, 3, 5]), (100, [1, 1, 1, 1, 1])])
def test_scales_are_held_over_some_steps_and_measured_where_due(every, measured, execution):
    activation = QuantizerConfig(bits=4, granularity="tensor", refresh_every=every)
    layer = quantized(randomised(nn.Linear(8, 3)), LayerConfig(activation=activation, execution=execution))
    inputs = [x * (1 + i) for i, x in enumerate(drifting(0, (2, 8), 6, 0.5, torch.float32))]
    states = [state for _, state, _ in play(layer, inputs)]
    scales = [float((x - state).abs().max()) / 7 for x, state in zip(inputs[1:], states, strict=False)]
    for step, source in enumerate(measured, 1):
        codes = (states[step] - states[step - 1]) / scales[source - 1]
        assert float((codes - codes.round()).abs().max()) < 1e-3
        assert float(codes.abs().max()) <= 8 + 1e-3


def test_what_an_old_scale_clips_is_sent_later_and_an_anchor_measures_again():
    jumped = [torch.ones(1, 8), 1.1 * torch.ones(1, 8), *[50 * torch.ones(1, 8)] * 6]
    for every, late in ((0, 0.1), (2, 1e-6)):
        config = LayerConfig(
            activation=QuantizerConfig(bits=4, refresh_every=4), modulation=ModulationConfig(reanchor_every=every)
        )
        states = [state for _, state, _ in play(quantized(randomised(nn.Linear(8, 3)), config), jumped)]
        errors = [float((x - state).abs().max()) for x, state in zip(jumped, states, strict=True)]
        assert (errors[2] > 40) == (every == 0)  # the scale was made for 0.1
        assert errors[-1] < late


def test_codes_are_freed_when_the_last_layer_has_read_them():
    clock, layers = group_of(2, shared=True)
    clock.start()
    for x in drifting(0, (2, 8), 2, 0.1, torch.float32):
        clock.call(None)
        layers[0](x)
        state = layers[0].loop.memories["default", 0].input
        assert state.update is not None
        layers[1](x)
    assert state.update is None


def test_rotation_and_dequantization_run_once_for_all_layers_of_a_group(monkeypatch):
    counts = {"rotate": 0, "dequantize": 0}

    def counted(module, name):
        function = getattr(module, name)

        def call(*arguments):
            counts[name] += 1
            return function(*arguments)

        monkeypatch.setattr(module, name, call)

    config = LayerConfig(activation=QuantizerConfig(bits=4), rotation="hadamard")
    clock, layers = group_of(3, shared=True, config=config)
    clock.start()
    first, second = drifting(0, (2, 8), 2, 0.1, torch.float32)
    step(clock, layers, first)
    counted(sharing, "rotate")
    counted(quantizer, "dequantize")
    step(clock, layers, second)
    assert counts == {"rotate": 1, "dequantize": 1}
