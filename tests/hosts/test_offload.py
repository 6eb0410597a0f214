"""Offloading: weights may come and go with each call; what would break without a word says so."""

from collections.abc import Callable

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading

import modiff
from modiff import ConfigError, StateError, presets
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits
from tests.hosts.tiny import SMALL

Way = Callable[[DiffusionPipeline], object]
CPU = torch.device("cpu")
CONFIG = presets.published(4, 8)  # anchors with the quantized weights, so that packing changes no bit


def applied(packed: bool = False) -> DiffusionPipeline:
    pipe = SMALL.build()
    modiff.apply(pipe, CONFIG)
    if packed:
        modiff.pack(pipe)
    return pipe


def by_groups(kind: str, **settings: int) -> Way:
    return lambda pipe: apply_group_offloading(pipe.unet, CPU, CPU, offload_type=kind, **settings)


AROUND: dict[str, Way] = {  # hooks on the network or its blocks
    "blocks": by_groups("block_level", num_blocks_per_group=1),
    "whole": lambda pipe: accelerate.cpu_offload_with_hook(pipe.unet, "cpu"),
}
WRAPPING: dict[str, Way] = {  # these replace the forward of every layer
    "leaves": by_groups("leaf_level"),
    "sequence": lambda pipe: accelerate.cpu_offload(pipe.unet, "cpu"),
    "buffers": lambda pipe: accelerate.cpu_offload(pipe.unet, "cpu", offload_buffers=True),
}


@pytest.fixture(scope="module")
def expected():
    return SMALL.call(applied())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", [*AROUND.values(), *WRAPPING.values()], ids=[*AROUND, *WRAPPING])
def test_outputs_are_the_same_bits_over_several_calls(way, packed, expected):
    pipe = applied(packed)
    way(pipe)
    for _ in range(2):
        assert_same_bits(SMALL.call(pipe), expected)
    if way in AROUND.values():  # these may come first, and stay
        way(pipe := SMALL.build())
        modiff.apply(pipe, CONFIG)
        assert_same_bits(SMALL.call(pipe), expected)
        modiff.remove(pipe)
        assert_same_bits(SMALL.call(pipe), SMALL.call(SMALL.build()))


def test_a_packed_weight_is_read_as_floats_behind_hooks_that_leave_it_in_memory_and_never_as_codes(expected):
    pipe, plain = applied(packed=True), applied(packed=True)
    layers = attachment_of(pipe.unet).layers
    accelerate.hooks.attach_align_device_hook(pipe.unet, execution_device="cpu")
    assert_same_bits(SMALL.call(pipe), expected)
    for name, layer in layers.items():
        assert_same_bits(layer.weight, plain.unet.get_submodule(name).weight)
    accelerate.hooks.remove_hook_from_submodules(pipe.unet)
    WRAPPING["sequence"](pipe)
    assert all(layer.weight.is_meta for layer in layers.values())
    assert_same_bits(SMALL.call(pipe), expected)


@pytest.mark.parametrize("way", WRAPPING.values(), ids=WRAPPING)
def test_hooks_on_each_layer_must_come_last_and_go_first(way):
    pipe = SMALL.build()
    way(pipe)
    with pytest.raises(ConfigError, match=r"another library replaced its forward"):
        modiff.apply(pipe, CONFIG)
    pipe = applied()
    way(pipe)
    with pytest.raises(StateError, match=r"remove: expected .* as modiff left it, got it wrapped by another library"):
        modiff.remove(pipe)


def test_weights_that_are_not_in_memory_are_not_saved_or_packed_as_nothing(tmp_path):
    pipe = applied()
    WRAPPING["sequence"](pipe)
    for verb in (lambda: modiff.save(pipe, tmp_path / "saved"), lambda: modiff.pack(pipe)):
        with pytest.raises(StateError, match=r"expected a weight in memory, got one on the meta device. It is offload"):
            verb()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("packed", [False, True])
def test_layerwise_casting_leaves_codes_and_scales_and_such_a_model_is_not_saved(packed, tmp_path):
    """float8 storage of the floats."""
    pipe = applied(packed)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert torch.isfinite(SMALL.call(pipe)).all()
    for name, tensor in pipe.unet.state_dict().items():
        if name.endswith("weight_scale") or not before[name].is_floating_point():
            assert_same_bits(tensor, before[name])
    with pytest.raises(StateError, match=r"expected a common dtype, got torch.float8_e4m3fn.*enable_layerwise_casting"):
        modiff.save(pipe, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_offloading_a_pipeline_on_a_real_device(packed):
    results = []
    for offload in (lambda p: p.to("cuda"), lambda p: p.enable_model_cpu_offload(), lambda p: p.enable_group_offload(
        onload_device=torch.device("cuda"), offload_device=CPU, offload_type="leaf_level", use_stream=True
    )):  # fmt: skip
        pipe = applied(packed)
        offload(pipe)
        results += [SMALL.call(pipe), SMALL.call(pipe)]
    for result in results:
        assert_same_bits(result, results[0])
