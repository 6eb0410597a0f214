"""Offloading: weights may come and go with each call; what would quietly break says so."""

from __future__ import annotations

from collections.abc import Callable

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading

import modiff
from modiff import ConfigError, StateError, presets
from tests.helpers import assert_same_bits
from tests.pixels import pixel_pipeline

CPU = torch.device("cpu")
CONFIG = presets.published(4, 8)  # anchors with the quantized weights, so that packing changes no bit


def call(pipe: DiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(2, generator, num_inference_steps=3, output_type="np", return_dict=False)[0])


def in_groups(pipe: DiffusionPipeline) -> None:
    apply_group_offloading(pipe.unet, CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def by_leaf(pipe: DiffusionPipeline) -> None:
    apply_group_offloading(pipe.unet, CPU, CPU, offload_type="leaf_level")


def as_a_whole(pipe: DiffusionPipeline) -> None:
    accelerate.cpu_offload_with_hook(pipe.unet, "cpu")


def in_sequence(pipe: DiffusionPipeline) -> None:
    accelerate.cpu_offload(pipe.unet, "cpu")


def with_buffers(pipe: DiffusionPipeline) -> None:
    accelerate.cpu_offload(pipe.unet, "cpu", offload_buffers=True)


WAYS: list[Callable[[DiffusionPipeline], None]] = [in_groups, by_leaf, as_a_whole, in_sequence, with_buffers]
WRAPPING = [by_leaf, in_sequence, with_buffers]  # these put a forward of their own on every layer


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    pipe = pixel_pipeline()
    modiff.apply(pipe, CONFIG)
    return call(pipe)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_the_same_bits_over_several_calls(way, packed, expected):
    pipe = pixel_pipeline()
    modiff.apply(pipe, CONFIG)
    if packed:
        modiff.pack(pipe)
    way(pipe)
    for _ in range(2):
        assert_same_bits(call(pipe), expected)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in WRAPPING])
def test_hooks_around_the_whole_network_or_its_blocks_may_come_first_and_stay(way, expected):
    pipe = pixel_pipeline()
    way(pipe)
    modiff.apply(pipe, CONFIG)
    assert_same_bits(call(pipe), expected)
    modiff.remove(pipe)
    assert_same_bits(call(pipe), call(pixel_pipeline()))


@pytest.mark.parametrize("way", WRAPPING)
def test_hooks_on_each_layer_must_come_last_and_go_first(way, tmp_path):
    pipe = pixel_pipeline()
    way(pipe)
    with pytest.raises(ConfigError, match=r"another library replaced its forward or weight"):
        modiff.apply(pipe, CONFIG)
    pipe = pixel_pipeline()
    modiff.apply(pipe, CONFIG)
    way(pipe)
    with pytest.raises(StateError, match=r"remove: expected .* as modiff left it, got it wrapped by another library"):
        modiff.remove(pipe)


@pytest.mark.parametrize("way", [in_sequence, with_buffers])
def test_weights_that_are_not_in_memory_are_not_saved_or_packed_as_nothing(way, tmp_path):
    pipe = pixel_pipeline()
    modiff.apply(pipe, CONFIG)
    way(pipe)
    for verb in (lambda: modiff.save(pipe, tmp_path / "saved"), lambda: modiff.pack(pipe)):
        with pytest.raises(
            StateError, match=r"expected a weight in memory, got one on the meta device. It is offloaded"
        ):
            verb()
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_that_offloads_by_groups_can_be_saved(tmp_path, expected):
    pipe = pixel_pipeline()
    modiff.apply(pipe, CONFIG)
    by_leaf(pipe)
    modiff.save(pipe, tmp_path / "saved")
    loaded = modiff.load(tmp_path / "saved")
    assert_same_bits(call(loaded), expected)
    by_leaf(loaded)
    assert_same_bits(call(loaded), expected)


def test_layerwise_casting_rounds_what_is_kept_and_such_a_model_is_not_saved(tmp_path):
    """float8 storage of the floats; codes and scales stay what they are."""
    pipe = pixel_pipeline()
    modiff.apply(pipe, presets.w8a8())
    modiff.pack(pipe)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert torch.isfinite(call(pipe)).all()
    for name, tensor in pipe.unet.state_dict().items():
        if name.endswith("weight_scale") or not before[name].is_floating_point():
            assert_same_bits(tensor, before[name])
    with pytest.raises(StateError, match=r"expected a common dtype, got torch.float8_e4m3fn.*enable_layerwise_casting"):
        modiff.save(pipe, tmp_path / "saved")
    pipe = pixel_pipeline()
    modiff.apply(pipe, presets.w8a8())
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(StateError, match="expected a common dtype"):
        modiff.save(pipe, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_offloading_a_pipeline_on_a_real_device(packed, tmp_path):
    results = []
    for offload in (lambda p: p.to("cuda"), lambda p: p.enable_model_cpu_offload(), lambda p: p.enable_group_offload(
        onload_device=torch.device("cuda"), offload_device=CPU, offload_type="leaf_level", use_stream=True
    )):  # fmt: skip
        pipe = pixel_pipeline()
        modiff.apply(pipe, CONFIG)
        if packed:
            modiff.pack(pipe)
        offload(pipe)
        results.append([call(pipe) for _ in range(2)])
    for first, second in results:
        assert_same_bits(first, results[0][0])
        assert_same_bits(second, results[0][0])
