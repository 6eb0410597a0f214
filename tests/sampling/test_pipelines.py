"""Parallel pipelines: images of the sequential ones, with guidance, spread over copies, and modulated."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, StableDiffusionPipeline
from torch import Tensor

import modiff
from modiff.sampling.pipelines import ParallelPipeline, ParallelStableDiffusionPipeline
from tests.helpers import assert_same_bits, relative_error
from tests.hosts.tiny import build_stable_diffusion
from tests.pixels import pixel_pipeline


@pytest.fixture(scope="module")
def pixels() -> DDIMPipeline:
    return pixel_pipeline()


@pytest.fixture(scope="module")
def text() -> StableDiffusionPipeline:
    pipe = build_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: DDIMPipeline, **settings) -> Any:
    """Of the pipeline's U-Net in parallel, as tensors."""
    fast = ParallelPipeline(unet=pipe.unet, scheduler=pipe.scheduler)
    fast.set_progress_bar_config(disable=True)
    return fast(2, generator=seeds(), num_inference_steps=10, **{"parallel": 4, "output_type": "pt"} | settings)


def prompted(pipe: Any, **settings) -> Any:
    words = {"prompt": ["red fox", "dim"], "negative_prompt": ["", "fox"], "num_inference_steps": 6}
    return pipe(**words, generator=seeds(), output_type="latent", **settings)


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_tolerance_0_gives_the_images_of_the_sequential_pipeline(pixels: DDIMPipeline, eta: float) -> None:
    expected = pixels(2, seeds(), eta, 10, output_type="np").images
    exact, close = images(pixels, tolerance=0.0, eta=eta), images(pixels, tolerance=0.05, eta=eta)
    assert relative_error(exact.images.permute(0, 2, 3, 1), torch.tensor(expected)) < 1e-5
    assert relative_error(close.images, exact.images) < 0.1
    assert close.iterations < exact.iterations <= 10
    assert 10 <= close.evaluations < exact.evaluations <= 40


def test_images_come_in_the_forms_of_diffusers() -> None:
    pipe = pixel_pipeline()
    pictures, iterations, evaluations = images(pipe, output_type="pil", return_dict=False)
    assert [picture.size for picture in pictures] == [(8, 8)] * 2
    assert iterations <= 10 <= evaluations
    pipe.unet.to(torch.bfloat16)
    arrays, tensors = (images(pipe, output_type=form).images for form in ("np", "pt"))
    assert arrays.dtype == "float32"
    assert_same_bits(torch.tensor(arrays), tensors.float().permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_type": "latent"}, "ParallelPipeline.output_type: expected pil, np or pt, got 'latent'"),
        ({"batch_size": 0}, "ParallelPipeline.batch_size: expected 1 or more, got 0"),
        (
            {"batch_size": 2, "generator": [torch.Generator()] * 3},
            "generator: expected one, or one for each of 2 images",
        ),
    ],
)
def test_what_gives_no_images_is_one_line(pixels: DDIMPipeline, settings: dict[str, Any], message: str) -> None:
    fast = ParallelPipeline(unet=pixels.unet, scheduler=pixels.scheduler)
    with pytest.raises(modiff.ConfigError, match=message):
        fast(**{"num_inference_steps": 2} | settings)


@pytest.mark.parametrize("module", ["corrected", "ddm", "masked", "noise_level", "pipelines"])
def test_a_fresh_interpreter_knows_folders_of_quantized_networks_with_each_module(module: str) -> None:
    """An import of one alone, before modiff has met any object of diffusers."""
    probe = (
        f"import modiff.sampling.{module}; from diffusers.quantizers import auto; auto.AUTO_QUANTIZER_MAPPING['modiff']"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=120)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_text_to_image_with_guidance_is_the_sequential_one(text: StableDiffusionPipeline, guidance: float) -> None:
    fast = ParallelStableDiffusionPipeline(**text.components, requires_safety_checker=False)
    fast.set_progress_bar_config(disable=True)
    expected = prompted(text, guidance_scale=guidance).images
    result = prompted(fast, guidance_scale=guidance, parallel=4, tolerance=0.0)
    assert relative_error(result.images, expected) < 1e-5
    one = {"prompt": "red fox", "num_inference_steps": 2, "output_type": "pt"}
    decoded = fast(**one, generator=seeds()[0], tolerance=0.0).images
    assert relative_error(decoded, text(**one, generator=seeds()[0]).images) < 1e-5
    fast.run_safety_checker = lambda images, *_: (torch.zeros_like(images), [True])  # black, and stays so
    assert fast(**one).images.count_nonzero() == 0


def test_a_callback_sees_the_steps_that_are_done_and_may_change_their_state(text: StableDiffusionPipeline) -> None:
    """As those of diffusers: (pipe, step, timestep, {"latents": ...}) -> what takes their place."""
    fast = ParallelStableDiffusionPipeline(**text.components, requires_safety_checker=False)
    fast.set_progress_bar_config(disable=True)
    seen: dict[Any, list[Any]] = {fast: [], text: []}

    def halved(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen[pipe].append((step, int(timestep)))
        return {"latents": state["latents"] / 2} if step == 2 else {}

    settings = {"callback_on_step_end": halved, "guidance_scale": 5.0}
    expected = prompted(text, **settings).images
    result = prompted(fast, **settings, parallel=1, tolerance=0.0)
    assert seen[fast] == seen[text]
    assert relative_error(result.images, expected) < 1e-5
    assert relative_error(result.images, prompted(text, guidance_scale=5.0).images) > 0.05


def test_rows_are_spread_over_copies_of_the_network(pixels: DDIMPipeline) -> None:
    calls = []
    other = copy.deepcopy(pixels.unet)
    other.register_forward_hook(lambda _, args, __: calls.append(args[1].tolist()))
    one, two = images(pixels, tolerance=0.0), images(pixels, tolerance=0.0, copies=[other])
    assert relative_error(two.images, one.images) < 1e-5
    assert calls[0] == [700, 600, 700, 600]  # the last two of the first four rows, of two images


def sequential(pipe: DDIMPipeline) -> Tensor:
    return torch.tensor(pipe(2, seeds(), 0.0, 10, output_type="np").images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("window", "tolerance", "anchors_alone"), [(1, 0.1, True), (4, 0.0, True), (4, 0.2, False)])
def test_modulated_pipelines_run_along_the_window(window: int, tolerance: float, anchors_alone: bool) -> None:
    pipe, settings = pixel_pipeline(), {"parallel": window, "tolerance": tolerance}
    full = images(pipe, **settings)
    modiff.apply(pipe, modiff.presets.modulated(8, 4))
    modulated = sequential(pipe)
    first, second = (images(pipe, **settings) for _ in range(2))
    assert_same_bits(first.images, second.images)
    error = relative_error(first.images, full.images)
    assert (error < 1e-5) == anchors_alone  # codes never come again exactly, so tolerance 0 leaves one row at a time
    assert error < 0.05
    assert_same_bits(sequential(pipe), modulated)


def test_modulated_text_to_image_runs_along_the_window(text: StableDiffusionPipeline) -> None:
    pipe = ParallelStableDiffusionPipeline(**build_stable_diffusion().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    full = prompted(text).images
    modiff.apply(pipe, modiff.presets.modulated(8, 8))
    assert 0 < relative_error(prompted(pipe, parallel=4, tolerance=0.0).images, full) < 0.02
    assert pipe.unet._modiff.automatic is not None
