"""Shared residuals: layers that read one tensor read one message, and whoever misses one is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modiff import LayerConfig, ModulationConfig, QuantizerConfig, StateError, WeightConfig
from modiff.core import recursion as modulation
from modiff.core.quantizer import Quantizer
from modiff.kernels import native
from modiff.nn import Clock, ModulatedLayer, quantized_class, stream
from modiff.nn.source import version_of
from modiff.nn.stream import Stream
from tests.helpers import assert_same_bits, drifting
from tests.recipes import randomised

CONFIG = LayerConfig(activation=QuantizerConfig(bits=4))


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that were coded, in order."""
    coded: list[Tensor] = []

    def counted(x, *rest):
        coded.append(x)
        return modulation.encode(x, *rest)

    monkeypatch.setattr(stream, "encode", counted)
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
    with pytest.raises(
        StateError, match=r"to_v: expected message 2 of its group, got message 3.*share_residuals='off'"
    ):
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
def test_a_tensor_changed_in_place_before_the_states_start_opens_a_stream_of_its_own(mode):
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
    quantizer = group_of(1, shared=False)[1][0].quantizer
    clock = Clock("model")
    clock.start()
    line = Stream(quantizer, ModulationConfig(reanchor_every=3), clock)
    anchors = []
    for x in drifting(0, (2, 8), 8, 0.1, torch.float32):
        clock.call(None)
        anchors.append(line.read("layer", x, x).anchor is not None)
    assert anchors == [True, False, False, True, False, False, True, False]
    assert line.count == 8


@pytest.mark.parametrize("shape", [(3, 8), (2, 2, 8)])
def test_a_shape_that_changes_inside_a_trajectory_is_refused(shape):
    clock, (layer, *_) = group_of(1, shared=False)
    clock.start()
    step(clock, [layer], torch.randn(2, 8))
    with pytest.raises(StateError, match=r"to_q: expected an input of shape \(2, 8\) on cpu, got \(\d, .*8\) on cpu"):
        step(clock, [layer], torch.randn(shape))


def test_the_states_of_a_shared_message_do_not_keep_the_input_alive():
    """A weak reference tells whether it is the same tensor: an address can be reused by another one."""
    clock, layers = group_of(2, shared=True)
    clock.start()
    first, second = drifting(0, (2, 8), 2, 0.1, torch.float32)
    step(clock, layers, first)
    clock.call(None)
    layers[0](second.clone())
    with pytest.raises(StateError, match="to_k: expected the tensor that its group read before, got another one"):
        layers[1](second)


def test_versions_of_inference_tensors_read_zero():
    x = torch.zeros(2)
    x.add_(1)
    assert version_of(x) == 1
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) == 0


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


def test_scales_are_measured_again_where_the_states_start_again():
    clock = Clock("model")
    config = QuantizerConfig(bits=4, granularity="tensor", refresh_every=100)
    stream = Stream(Quantizer(config, "tensor", -1, (8,)), ModulationConfig(reanchor_every=3), clock)
    inputs = [x * (1 + i) for i, x in enumerate(drifting(0, (2, 8), 6, 0.5, torch.float32))]
    scales = []
    clock.start()
    for x in inputs:
        clock.call(None)
        message = stream.read("layer", x, x)
        scales += [float(code.parts[0][1].scale) for code in message.codes]
    assert scales[0] == scales[1] != scales[2] == scales[3]
