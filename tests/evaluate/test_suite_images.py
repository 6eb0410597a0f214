"""A pipeline as the source of images: those of diffusers alone, the same in any batch, and a model left as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import modiff
from modiff import presets
from modiff.errors import ConfigError
from modiff.evaluate.cost import measure_cost
from modiff.evaluate.suite_images import PipelineSource, to_codes
from modiff.evaluate.suite_plans import Plan
from modiff.generate.conditions import Conditions
from modiff.hosts.diffusers import is_attached
from modiff.hosts.noise import noise_generators
from modiff.model.trajectory import state_bytes
from tests.hosts.tiny import HOSTS
from tests.pixels import pixel_pipeline

STEPS = 3
FULL = Plan(name="full", steps=STEPS)
MODULATED = Plan(name="modulated", steps=STEPS, config=presets.modulated(8, 4))


OTHERS = {"dit": Conditions(labels=(7,)), "sd": Conditions(prompts=("a fox jumps",))}


def drawn(source: PipelineSource, plan: Plan, *batches: range) -> np.ndarray:
    with source.open(plan, lambda: None) as session:
        return np.concatenate([session.draw(batch).images for batch in batches])


def test_full_precision_images_are_those_of_diffusers_rounded_to_bytes() -> None:
    noise = [torch.Generator().manual_seed(7 + i) for i in range(2)]
    wanted = pixel_pipeline()(batch_size=2, num_inference_steps=STEPS, generator=noise, output_type="np").images
    found = drawn(PipelineSource(pixel_pipeline(), seed=7), FULL, range(2))
    assert np.array_equal(found, np.rint(np.float64(wanted) * 255).astype(np.uint8))


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
    found = drawn(source, MODULATED, range(2))
    modiff.apply(pipe, MODULATED.config)
    wanted = pipe(batch_size=2, num_inference_steps=STEPS, generator=noise_generators(0, range(2)), output_type="np")
    modiff.remove(pipe)
    assert np.array_equal(found, to_codes(wanted.images)[0])
    assert not is_attached(source.pipe)
    assert not source.pipe.unet._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())


def test_the_model_is_left_alone_when_drawing_fails() -> None:
    source = PipelineSource(pixel_pipeline())
    with pytest.raises(KeyboardInterrupt), source.open(MODULATED, lambda: None):
        raise KeyboardInterrupt
    assert not is_attached(source.pipe)
    assert not source.pipe.unet._forward_hooks


def test_states_are_measured_at_the_end_of_the_trajectory_and_every_evaluation_is_told() -> None:
    source, told = PipelineSource(pixel_pipeline()), []
    held: list[int] = []
    with source.open(MODULATED, lambda: told.append(1)) as session:
        handle = source.pipe.unet.register_forward_hook(lambda model, *_: held.append(state_bytes(model)))
        found = session.draw(range(2))
        handle.remove()
    assert len(told) == STEPS
    assert found.state_bytes == held[-1] > 0
    with source.open(FULL, lambda: None) as session:
        assert session.draw(range(2)).state_bytes == 0


def test_bit_operations_are_those_of_the_plans_steps_and_bits() -> None:
    source = PipelineSource(pixel_pipeline())
    sample = torch.zeros(1, 1, 8, 8)
    macs = sum(layer.macs for layer in measure_cost(source.pipe.unet, lambda: source.pipe.unet(sample, 1)).layers)
    with source.open(FULL, lambda: None) as session:
        assert session.gbops == pytest.approx(STEPS * macs * 32 * 32 / 1e9)
        full = session.gbops
    with source.open(MODULATED, lambda: None) as session:
        assert session.gbops < full / 2


def test_static_scales_are_measured_on_other_noise_first() -> None:
    layer = presets.modulated(8, 8).layer
    activation = dataclasses.replace(layer.activation, dynamic=False, granularity="tensor")
    config = dataclasses.replace(presets.modulated(8, 8), layer=dataclasses.replace(layer, activation=activation))
    found = drawn(PipelineSource(pixel_pipeline()), Plan(name="static", steps=STEPS, config=config), range(2))
    full = drawn(PipelineSource(pixel_pipeline()), FULL, range(2))
    assert np.linalg.norm(found.astype(float) - full) < 0.2 * np.linalg.norm(full.astype(float))


def test_it_knows_the_images_shape_and_what_shapes_them() -> None:
    source = PipelineSource(pixel_pipeline(), sampler="euler", seed=5)
    assert source.shape == (8, 8, 1)
    assert (source.settings["sampler"], source.settings["seed"]) == ("euler", 5)
    assert source.settings["model"] == PipelineSource(pixel_pipeline()).settings["model"]
    assert source.settings["model"] != PipelineSource(pixel_pipeline(seed=1)).settings["model"]


@pytest.mark.parametrize("change", [{"beta_schedule": "squaredcos_cap_v2"}, {"timestep_spacing": "linspace"}])
def test_another_noise_schedule_is_another_job(change: dict[str, str]) -> None:
    pipe = pixel_pipeline()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **change)
    assert PipelineSource(pipe).settings != PipelineSource(pixel_pipeline()).settings


@pytest.mark.parametrize(
    ("name", "known"),
    [("dit", Conditions(labels=(3, 999, 0))), ("sd", Conditions(prompts=("a fox", "a cat", "two words more")))],
)
def test_a_conditional_pipeline_draws_each_image_of_its_own_class_or_prompt(name: str, known: Conditions) -> None:
    pipe = HOSTS[name].build()
    pipe.set_progress_bar_config(disable=True)
    source = PipelineSource(pipe, conditions=known)
    found = drawn(source, FULL, range(1), range(1, 4)).astype(int)
    inputs = {"class_labels": [3, 999, 0, 3]} if name == "dit" else {"prompt": ["a fox", "a cat", known.prompts[2]] * 2}
    if name == "sd":
        inputs["prompt"] = inputs["prompt"][:4]
    noise = noise_generators(0, range(4))
    wanted = pipe(**inputs, num_inference_steps=STEPS, generator=noise, output_type="np").images
    assert np.abs(found - 255 * wanted).max() <= 2.5  # another batch: rounding
    assert np.abs(drawn(PipelineSource(pipe, conditions=OTHERS[name]), FULL, range(2)) - found[:2]).max() > 2
    assert drawn(source, MODULATED, range(2)).shape == (2, *source.shape)
    assert source.settings["labels" if name == "dit" else "prompts"] == (
        "3, 999, 0" if name == "dit" else "a fox, a cat, two words more"
    )


def test_many_prompts_are_told_by_their_number_and_a_digest() -> None:
    many = Conditions(prompts=tuple(f"prompt number {i}" for i in range(50)))
    pipe = HOSTS["sd"].build()
    pipe.set_progress_bar_config(disable=True)
    first = PipelineSource(pipe, conditions=many).settings["prompts"]
    assert first.startswith("50, sha256 ")
    turned = Conditions(prompts=many.prompts[1:] + many.prompts[:1])
    assert PipelineSource(pipe, conditions=turned).settings["prompts"] != first


def test_a_pipeline_with_a_prompt_and_too_many_steps_are_refused() -> None:
    class Prompted(type(pixel_pipeline())):  # type: ignore[misc]
        def __call__(self, prompt: str, batch_size: int = 1) -> Any:
            raise NotImplementedError

    pipe = pixel_pipeline()
    with pytest.raises(ConfigError, match="expected no --prompt TEXT, got 'a fox jumps'"):
        PipelineSource(pixel_pipeline(), conditions=OTHERS["sd"])
    with pytest.raises(ConfigError, match=r"expected an unconditional pipeline, got Prompted.*Give --prompts FILE"):
        PipelineSource(Prompted(unet=pipe.unet, scheduler=pipe.scheduler))
    with (
        pytest.raises(ConfigError, match="--steps: expected at most 1000, got 1001"),
        PipelineSource(pipe).open(Plan(name="long", steps=1001), lambda: None),
    ):
        pass


def test_pixels_are_rounded_to_nearest_clipped_and_those_that_are_not_finite_counted() -> None:
    images = np.array([[0.0, 1.0, 0.5, 1.4 / 255], [-1.0, 2.0, 1.6 / 255, 1.0], [np.nan, np.inf, 1, 0]])
    codes, broken = to_codes(images.reshape(3, 2, 2, 1))
    assert codes.reshape(3, 4).tolist() == [[0, 255, 128, 1], [0, 255, 2, 255], [0, 255, 255, 0]]
    assert broken == 1
