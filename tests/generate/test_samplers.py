"""Samplers by name: each one samples, alone and modulated, and none runs on a model it cannot follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline

import modiff
from modiff.errors import ConfigError, StateError
from modiff.generate.samplers import SAMPLERS, set_scheduler
from modiff.hosts.diffusers.runs import noise_generators
from tests.hosts.tiny import HOSTS
from tests.pixels import pixel_pipeline

NAMES = ["ddim", "ddpm", "pndm", "dpmsolver++", "dpmsolver++2s", "sde-dpmsolver++", "euler", "heun", "unipc"]


def images(pipe: DiffusionPipeline, seeds: range = range(2), steps: int = 6) -> np.ndarray:
    return pipe(
        batch_size=len(seeds), num_inference_steps=steps, generator=noise_generators(0, seeds), output_type="np"
    ).images


def test_the_names_are_those_of_the_readme() -> None:
    assert [*NAMES, "flow-euler"] == list(SAMPLERS)


@pytest.mark.parametrize("name", NAMES)
def test_a_pixel_pipeline_samples_with_it_and_off_bits_change_nothing(name: str) -> None:
    pipe = set_scheduler(pixel_pipeline(), name)
    assert type(pipe.scheduler).__name__ == SAMPLERS[name].kind
    plain = images(pipe)
    assert plain.shape == (2, 8, 8, 1)
    assert np.isfinite(plain).all()
    assert plain.std() > 0.05
    modiff.apply(pipe, modiff.presets.modulated(None, None))
    # float32 sums of some hundred products in another order, over six steps
    assert np.abs(images(pipe) - plain).max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_the_batch_it_is_made_in(name: str) -> None:
    pipe = set_scheduler(pixel_pipeline(), name)
    alone = np.concatenate([images(pipe, range(i, i + 1)) for i in range(2)])
    assert np.abs(images(pipe) - alone).max() < 1e-4  # batched kernels sum in another order


@pytest.fixture(scope="module")
def converged() -> np.ndarray:
    return images(pixel_pipeline(), steps=100)


@pytest.mark.parametrize("name", ["pndm", "dpmsolver++", "dpmsolver++2s", "euler", "heun", "unipc"])
def test_with_many_steps_the_deterministic_ones_meet(name: str, converged: np.ndarray) -> None:
    """All solve the same equation; a wrong noise scale, step order or prediction type would lead elsewhere."""
    sampled = images(set_scheduler(pixel_pipeline(), name), steps=20)
    # they stop at slightly different last noise levels, 0.05 to 0.07 here; an ancestral sampler is 0.9 away
    assert np.linalg.norm(sampled - converged) < 0.12 * np.linalg.norm(converged)


@pytest.mark.parametrize("name", ["ddpm", "sde-dpmsolver++"])
def test_the_ancestral_ones_draw_noise_of_their_own(name: str, converged: np.ndarray) -> None:
    sampled = images(set_scheduler(pixel_pipeline(), name), steps=20)
    assert np.linalg.norm(sampled - converged) > 0.4 * np.linalg.norm(converged)


def test_the_noise_schedule_is_carried_over_and_the_given_pipeline_keeps_its_own() -> None:
    pipe = pixel_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.05)
    other = set_scheduler(pipe, "euler")
    assert other.scheduler.config.beta_end == 0.05
    assert other.scheduler.config.prediction_type == "v_prediction"
    assert other.unet is pipe.unet
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


def test_ddim_and_ddpm_equal_the_pipelines_of_diffusers() -> None:
    pipe = pixel_pipeline()
    ddpm = DDPMPipeline(unet=pipe.unet, scheduler=DDPMScheduler.from_config(pipe.scheduler.config))
    ddpm.set_progress_bar_config(disable=True)
    assert np.array_equal(images(set_scheduler(ddpm, "ddim")), images(pipe))
    assert np.array_equal(images(set_scheduler(pipe, "ddpm")), images(ddpm))


def test_other_pipelines_are_changed_in_place() -> None:
    pipe = HOSTS["sd"].build()
    assert set_scheduler(pipe, "heun") is pipe
    assert type(pipe.scheduler).__name__ == "HeunDiscreteScheduler"
    assert torch.isfinite(HOSTS["sd"].call(pipe, steps=2)).all()


@pytest.mark.parametrize("name", ["flow-euler", "unipc", "dpmsolver++"])
def test_a_flow_model_keeps_its_path_and_shift(name: str) -> None:
    pipe = set_scheduler(HOSTS["wan"].build(), name)
    config = pipe.scheduler.config
    assert (config.shift if name == "flow-euler" else config.flow_shift) == 3.0
    assert name == "flow-euler" or (config.use_flow_sigmas and config.prediction_type == "flow_prediction")
    assert torch.isfinite(HOSTS["wan"].call(pipe, steps=2)).all()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"expected one of ddim, .*flow-euler, got 'ddimm'"):
        set_scheduler(pixel_pipeline(), "ddimm")


@pytest.mark.parametrize(("host", "name", "why"), [("ddim", "flow-euler", "a noise schedule"), ("wan", "ddim", "flow")])
def test_a_sampler_that_cannot_follow_the_model_is_an_error(host: str, name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"got '{name}'. The model was trained for {why}"):
        set_scheduler(HOSTS[host].build(), name)


def test_it_is_chosen_before_modiff_is_applied() -> None:
    pipe = pixel_pipeline()
    modiff.apply(pipe, modiff.presets.w8a8())
    with pytest.raises(StateError, match=r"before modiff\.apply"):
        set_scheduler(pipe, "euler")
