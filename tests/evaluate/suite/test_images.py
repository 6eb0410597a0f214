"""Images of a pipeline: those of diffusers, in any batch, the model left as it was; and real images from files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import modiff
from modiff import presets
from modiff.errors import ConfigError, FormatError
from modiff.evaluate.suite import images as module
from modiff.evaluate.suite.images import PipelineSource, read_reference, reference_digest, to_codes
from modiff.evaluate.suite.plans import Plan
from modiff.generate.job import Conditions
from modiff.generate.shards import Manifest, write_images
from modiff.hosts.diffusers.runs import noise_generators
from modiff.hosts.host import is_attached
from modiff.model.trajectory import state_bytes
from tests.hosts.tiny import HOSTS
from tests.pixels import pixel_pipeline

STEPS = 3
FULL = Plan(name="full", steps=STEPS)
MODULATED = Plan(name="modulated", steps=STEPS, config=presets.modulated(8, 4))


OTHERS = {"dit": Conditions(labels=(7,)), "sd": Conditions(prompts=("a fox jumps",))}


def drawn(source: PipelineSource, plan: Plan, *batches: range) -> np.ndarray:
    with source.open(plan) as draw:
        return np.concatenate([draw(batch).images for batch in batches])


def test_full_precision_images_are_those_of_diffusers_rounded_to_bytes() -> None:
    noise = [torch.Generator().manual_seed(7 + i) for i in range(2)]
    expected = pixel_pipeline()(batch_size=2, num_inference_steps=STEPS, generator=noise, output_type="np").images
    images = drawn(PipelineSource(pixel_pipeline(), seed=7), FULL, range(2))
    assert np.array_equal(images, np.rint(np.float64(expected) * 255).astype(np.uint8))


@pytest.mark.parametrize("plan", [FULL, MODULATED], ids=lambda plan: plan.name)
def test_an_image_is_the_same_in_any_batch(plan: Plan) -> None:
    source = PipelineSource(pixel_pipeline())
    together, apart = drawn(source, plan, range(4)), drawn(source, plan, range(1), range(1, 4))
    difference = together.astype(int) - apart.astype(int)
    # float rounding may tip single codes of a layer, never a whole image
    assert (difference != 0).mean() < 0.02


def test_a_plan_gets_its_config_and_the_model_is_left_alone() -> None:
    pipe = pixel_pipeline()
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    source = PipelineSource(pipe)
    images = drawn(source, MODULATED, range(2))
    modiff.apply(pipe, MODULATED.config)
    expected = pipe(batch_size=2, num_inference_steps=STEPS, generator=noise_generators(0, range(2)), output_type="np")
    modiff.remove(pipe)
    assert np.array_equal(images, to_codes(expected.images)[0])
    assert not is_attached(source.pipe)
    assert not source.pipe.unet._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())


def test_states_are_measured_at_the_end_of_the_trajectory_and_every_evaluation_is_told() -> None:
    source, told = PipelineSource(pixel_pipeline()), []
    sizes: list[int] = []
    with source.open(MODULATED, lambda: told.append(1)) as draw:
        handle = source.pipe.unet.register_forward_hook(lambda model, *_: sizes.append(state_bytes(model)))
        images = draw(range(2))
        handle.remove()
    assert len(told) == STEPS
    assert images.state_bytes == sizes[-1] > 0
    with source.open(FULL) as draw:
        assert draw(range(2)).state_bytes == 0


def test_static_scales_are_measured_on_other_noise_first() -> None:
    layer = presets.modulated(8, 8).layer
    activation = dataclasses.replace(layer.activation, dynamic=False, granularity="tensor")
    config = dataclasses.replace(presets.modulated(8, 8), layer=dataclasses.replace(layer, activation=activation))
    images = drawn(PipelineSource(pixel_pipeline()), Plan(name="static", steps=STEPS, config=config), range(2))
    full = drawn(PipelineSource(pixel_pipeline()), FULL, range(2))
    assert np.linalg.norm(images.astype(float) - full) < 0.2 * np.linalg.norm(full.astype(float))


@pytest.mark.parametrize(
    ("name", "known"),
    [("dit", Conditions(labels=(3, 999, 0))), ("sd", Conditions(prompts=("a fox", "a cat", "two words more")))],
)
def test_a_conditional_pipeline_draws_each_image_of_its_own_class_or_prompt(name: str, known: Conditions) -> None:
    pipe = HOSTS[name].build()
    pipe.set_progress_bar_config(disable=True)
    source = PipelineSource(pipe, conditions=known)
    images = drawn(source, FULL, range(1), range(1, 4)).astype(int)
    inputs = {"class_labels": [3, 999, 0, 3]} if name == "dit" else {"prompt": ["a fox", "a cat", known.prompts[2]] * 2}
    if name == "sd":
        inputs["prompt"] = inputs["prompt"][:4]
    noise = noise_generators(0, range(4))
    expected = pipe(**inputs, num_inference_steps=STEPS, generator=noise, output_type="np").images
    assert np.abs(images - 255 * expected).max() <= 2.5  # another batch: rounding
    assert np.abs(drawn(PipelineSource(pipe, conditions=OTHERS[name]), FULL, range(2)) - images[:2]).max() > 2
    assert drawn(source, MODULATED, range(2)).shape == (2, *source.shape)
    assert source.settings["labels" if name == "dit" else "prompts"] == (
        "3, 999, 0" if name == "dit" else "a fox, a cat, two words more"
    )


def test_a_pipeline_with_a_prompt_and_too_many_steps_are_refused() -> None:
    class Prompted(type(pixel_pipeline())):  # type: ignore[misc]
        def __call__(self, prompt: str, batch_size: int = 1) -> Any:
            raise NotImplementedError

    pipe = pixel_pipeline()
    with pytest.raises(ConfigError, match="expected no --prompt TEXT, got 'a fox jumps'"):
        PipelineSource(pixel_pipeline(), conditions=OTHERS["sd"])
    with pytest.raises(ConfigError, match=r"expected an unconditional pipeline, got Prompted.*takes --prompts FILE"):
        PipelineSource(Prompted(unet=pipe.unet, scheduler=pipe.scheduler))
    with (
        pytest.raises(ConfigError, match="--steps: expected at most 1000, got 1001"),
        PipelineSource(pipe).open(Plan(name="long", steps=1001)),
    ):
        pass


def test_pixels_are_rounded_to_nearest_clipped_and_those_that_are_not_finite_counted() -> None:
    images = np.array([[0.0, 1.0, 0.5, 1.4 / 255], [-1.0, 2.0, 1.6 / 255, 1.0], [np.nan, np.inf, 1, 0]])
    codes, broken = to_codes(images.reshape(3, 2, 2, 1))
    assert codes.reshape(3, 4).tolist() == [[0, 255, 128, 1], [0, 255, 2, 255], [0, 255, 255, 0]]
    assert broken == 1


IMAGES = np.arange(12 * 4 * 5 * 3, dtype=np.uint32).reshape(12, 4, 5, 3).astype(np.uint8)


def npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", labels=np.arange(12), arr_0=IMAGES)
    return folder / "a.npz"


def npy(folder: Path) -> Path:
    np.save(folder / "a.npy", IMAGES)
    return folder / "a.npy"


def pictures(folder: Path) -> Path:
    for i in reversed(range(12)):
        Image.fromarray(IMAGES[i]).save(folder / f"{i}.png")
    (folder / "labels.txt").write_text("")
    return folder


def generated(folder: Path) -> Path:
    manifest = Manifest(model="m", request={}, num_images=12, shape=(4, 5, 3), batch_size=4, shard_size=8)
    for first in (0, 8):
        shard = write_images(folder, manifest, first, IMAGES[first : first + 8], {})
        manifest = manifest.with_shard(shard)
    manifest.save(folder)
    return folder


KINDS = (npz, npy, pictures, generated)


@pytest.mark.parametrize("write", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_gives_all_images_in_order(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)
    batches = list(read_reference(write(tmp_path)))
    assert np.array_equal(np.concatenate(batches), IMAGES)
    assert max(map(len, batches)) <= 8


def test_the_digest_is_that_of_the_images(tmp_path: Path) -> None:
    before = reference_digest(npy(tmp_path))
    assert reference_digest(npz(tmp_path)) == before
    np.save(tmp_path / "a.npy", IMAGES ^ (np.arange(IMAGES.size).reshape(IMAGES.shape) == IMAGES.size - 1))
    assert reference_digest(tmp_path / "a.npy") != before


@pytest.mark.parametrize(
    ("name", "array"), [("float", IMAGES / 255), ("flat", IMAGES.reshape(12, -1)), ("empty", IMAGES[:0])]
)
def test_arrays_that_are_no_images_are_named(name: str, array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(FormatError, match=rf"{name}\.npy: expected uint8 images \(N, H, W, C\), got"):
        list(read_reference(tmp_path / f"{name}.npy"))


def test_nothing_there_an_empty_folder_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FormatError, match="got none there"):
            list(read_reference(path))
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04nothing")
    with pytest.raises(FormatError, match=r"a\.npz: expected images, got"):
        list(read_reference(tmp_path / "a.npz"))
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"b\.png: expected images, got UnidentifiedImageError"):
        list(read_reference(tmp_path / "b.png"))
