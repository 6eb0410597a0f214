"""Samplers by name: each one samples, alone and modulated, and none runs on a model it cannot follow."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline

import modiff
from modiff.errors import ConfigError, StateError
from modiff.generate.samplers import SAMPLERS, set_scheduler, usual_sampler
from modiff.hosts.diffusers.runs import noise_generators
from tests.hosts.tiny import HOSTS
from tests.pixels import pixel_pipeline

ANCESTRAL = ("ddpm", "sde-dpmsolver++", "ddm")


def images(pipe: DiffusionPipeline, seeds: range = range(2), steps: int = 6) -> np.ndarray:
    return pipe(
        batch_size=len(seeds), num_inference_steps=steps, generator=noise_generators(0, seeds), output_type="np"
    ).images


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "flow-euler"])
def test_an_image_is_the_same_in_any_batch_and_off_bits_change_nothing(name: str) -> None:
    pipe = set_scheduler(pixel_pipeline(), name)
    assert type(pipe.scheduler).__name__ == SAMPLERS[name].kind
    plain = images(pipe)
    assert plain.shape == (2, 8, 8, 1)
    assert plain.std() > 0.05
    # float32 sums of some hundred products in another order, over six steps
    assert np.abs(images(pipe, range(1, 2)) - plain[1:]).max() < 1e-4
    modiff.apply(pipe, modiff.presets.modulated(None, None))
    assert np.abs(images(pipe) - plain).max() < 1e-4


def test_a_network_in_bfloat16_gives_arrays() -> None:
    pipe = set_scheduler(pixel_pipeline(), "ddm")
    pipe.unet.to(torch.bfloat16)
    assert images(pipe, steps=2).dtype == np.float32


@pytest.fixture(scope="module")
def converged() -> np.ndarray:
    return images(pixel_pipeline(), steps=100)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ddim", "flow-euler")])
def test_with_many_steps_the_deterministic_ones_meet_and_the_ancestral_ones_draw_noise(
    name: str, converged: np.ndarray
) -> None:
    """All solve the same equation; a wrong noise scale, step order or prediction type would lead elsewhere."""
    sampled = images(set_scheduler(pixel_pipeline(), name), steps=20)
    error = np.linalg.norm(sampled - converged) / np.linalg.norm(converged)
    # they stop at slightly different last noise levels, 0.05 to 0.07 here; an ancestral sampler is 0.9 away
    assert error > 0.4 if name in ANCESTRAL else error < 0.12


def test_the_noise_schedule_is_carried_over_and_the_pipeline_before_keeps_its_own() -> None:
    pipe = pixel_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.05)
    other = set_scheduler(pipe, "euler")
    assert (other.scheduler.config.beta_end, other.scheduler.config.prediction_type) == (0.05, "v_prediction")
    assert other.unet is pipe.unet
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


def test_ddim_and_ddpm_equal_the_pipelines_of_diffusers() -> None:
    pipe = pixel_pipeline()
    ddpm = DDPMPipeline(unet=pipe.unet, scheduler=DDPMScheduler.from_config(pipe.scheduler.config))
    ddpm.set_progress_bar_config(disable=True)
    assert np.array_equal(images(set_scheduler(ddpm, "ddim")), images(pipe))
    assert np.array_equal(images(set_scheduler(pipe, "ddpm")), images(ddpm))


@pytest.mark.parametrize("name", ["flow-euler", "unipc"])
def test_a_flow_model_is_changed_in_place_and_keeps_its_path_and_shift(name: str) -> None:
    pipe = HOSTS["wan"].build()
    assert (usual_sampler(pipe), usual_sampler(pixel_pipeline())) == (None, "ddim")
    assert set_scheduler(pipe, name) is pipe
    config = pipe.scheduler.config
    assert (config.shift if name == "flow-euler" else config.flow_shift) == 3.0
    assert name == "flow-euler" or (config.use_flow_sigmas and config.prediction_type == "flow_prediction")
    assert torch.isfinite(HOSTS["wan"].call(pipe, steps=2)).all()


def test_a_sampler_that_cannot_follow_the_model_is_an_error() -> None:
    pipe = pixel_pipeline()
    for target, name, message in (
        (pipe, "ddimm", r"expected one of ddim, .*flow-euler, got 'ddimm'"),
        (pipe, "flow-euler", "got 'flow-euler'. The model was trained for a noise schedule"),
        (HOSTS["wan"].build(), "ddim", "got 'ddim'. The model was trained for flow"),
    ):
        with pytest.raises(ConfigError, match=message):
            set_scheduler(target, name)
    modiff.apply(pipe, modiff.presets.w8a8())
    with pytest.raises(StateError, match=r"before modiff\.apply"):
        set_scheduler(pipe, "euler")
