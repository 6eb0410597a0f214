"""Images of a pipeline: those of diffusers, in any batch, of their own prompt or class, the model left as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import modiff
from modiff import presets
from modiff.config import ModiffConfig
from modiff.errors import ConfigError
from modiff.evaluate.pipelines import PipelineSource
from modiff.generate.job import Conditions
from modiff.hosts.diffusers.runs import noise_generators
from modiff.model.trajectory import state_bytes
from tests.hosts.tiny import HOSTS
from tests.pixels import pixel_pipeline

STEPS = 3
W8A4 = presets.modulated(8, 4)


def drawn(source: PipelineSource, config: ModiffConfig | None, *batches: range) -> np.ndarray:
    with source.open(config, STEPS) as draw:
        return np.concatenate([draw(batch).images for batch in batches])


@pytest.mark.parametrize("config", [None, W8A4], ids=["full", "modulated"])
def test_images_are_those_of_diffusers_in_any_batch_and_the_model_is_left_alone(config: ModiffConfig | None) -> None:
    pipe = pixel_pipeline()
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    source = PipelineSource(pipe, seed=7)
    with pytest.raises(RuntimeError, match="in the body"), source.open(config, STEPS):
        raise RuntimeError("in the body")
    together, apart = drawn(source, config, range(4)), drawn(source, config, range(1), range(1, 4))
    # float rounding may tip single codes of a layer, never a whole image
    assert (np.abs(together - apart) > 1 / 255).mean() < 0.02
    noise = [torch.Generator().manual_seed(7 + i) for i in range(4)]
    if config is not None:
        modiff.apply(pipe, config)  # raises if modiff were still on it
    images = pipe(batch_size=4, num_inference_steps=STEPS, generator=noise, output_type="np").images
    if config is not None:
        modiff.remove(pipe)
    assert np.array_equal(images, together)
    assert not pipe.unet._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())


def test_states_are_measured_at_the_end_of_the_trajectory_and_every_evaluation_is_counted(monkeypatch) -> None:
    source, sizes, steps = PipelineSource(pixel_pipeline()), [], []
    with source.bar([("a", 1, STEPS)], shown=False) as bar, source.open(W8A4, STEPS) as draw:
        monkeypatch.setattr(bar, "step", lambda: steps.append(1))
        handle = source.pipe.unet.register_forward_hook(lambda model, *_: sizes.append(state_bytes(model)))
        images = draw(range(2))
        handle.remove()
        assert len(steps) == STEPS
    assert images.state_bytes == sizes[-1] > 0
    with source.open(None, STEPS) as draw:
        assert draw(range(2)).state_bytes == 0


def test_static_scales_are_measured_on_other_noise_first() -> None:
    activation = dataclasses.replace(W8A4.layer.activation, bits=8, dynamic=False, granularity="tensor")
    config = dataclasses.replace(W8A4, layer=dataclasses.replace(W8A4.layer, activation=activation))
    source = PipelineSource(pixel_pipeline())
    images, full = drawn(source, config, range(2)), drawn(source, None, range(2))
    assert np.linalg.norm(images - full) < 0.2 * np.linalg.norm(full)


@pytest.mark.parametrize(
    ("name", "inputs", "other"),
    [
        ("dit", {"labels": (3, 999, 0)}, {"labels": (7,)}),
        ("sd", {"prompts": ("a fox", "a cat", "two words more")}, {"prompts": ("a fox jumps",)}),
    ],
)
def test_a_conditional_pipeline_draws_each_image_of_its_own_class_or_prompt(
    name: str, inputs: dict[str, Any], other: dict[str, Any]
) -> None:
    pipe = HOSTS[name].build()
    pipe.set_progress_bar_config(disable=True)
    source = PipelineSource(pipe, conditions=Conditions(**inputs))
    images = drawn(source, None, range(1), range(1, 4))
    ((kind, values),) = inputs.items()
    argument = {"labels": "class_labels", "prompts": "prompt"}[kind]
    taken = {argument: [*values, values[0]]}
    expected = pipe(
        **taken, num_inference_steps=STEPS, generator=noise_generators(0, range(4)), output_type="np"
    ).images
    assert np.abs(images - expected).max() <= 0.01  # another batch: rounding
    changed = drawn(PipelineSource(pipe, conditions=Conditions(**other)), None, range(2))
    assert np.abs(changed - images[:2]).max() > 0.01
    assert drawn(source, W8A4, range(2)).shape == (2, *source.shape)
    assert source.settings[kind] == ", ".join(map(str, values))


def test_inputs_that_a_pipeline_cannot_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected no `prompt`, got 'a fox'"):
        PipelineSource(pixel_pipeline(), conditions=Conditions(prompts=("a fox",)))
    with pytest.raises(ConfigError, match="expected `prompt`, got none"):
        PipelineSource(HOSTS["sd"].build())
    with pytest.raises(ConfigError, match="steps: expected at most 1000, got 1001"):
        PipelineSource(pixel_pipeline()).open(None, 1001).__enter__()
