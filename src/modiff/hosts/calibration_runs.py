"""Trajectories to calibrate on, for pipelines that need no prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from modiff.errors import ConfigError
from modiff.hosts.inputs import call_inputs
from modiff.hosts.noise import noise_generators


def calibration_run(pipe: DiffusionPipeline, *, steps: int, batch: int, seed: int = 0) -> Callable[[int], object]:
    """`run(i)` for `modiff.collect`: generates `batch` images from the noise of seed + i * batch, ... .

    Pipelines that draw classes get classes drawn from all of them, evenly and anew in each run: activation ranges of
    one class are not those of the others.

    Raises: ConfigError if the pipeline needs a prompt, or other inputs.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" in parameters:
        raise ConfigError(
            f"{type(pipe).__name__}: expected run=, a function that generates from prompts, got none. Calibration "
            "prompts should be like those that follow. Give run=lambda i: pipe(prompts[i], ...)."
        )
    labelled = "class_labels" in parameters
    call_inputs(pipe, 1, prompt=None, label=0 if labelled else None)  # raises where more is needed

    def run(index: int) -> object:
        inputs: dict[str, Any] = {"batch_size": batch}
        if labelled:
            generator = torch.Generator().manual_seed(seed + index)
            classes = pipe.transformer.config.num_embeds_ada_norm
            inputs = {"class_labels": torch.randint(classes, (batch,), generator=generator).tolist()}
        noise = noise_generators(seed, range(index * batch, (index + 1) * batch))
        return pipe(**inputs, num_inference_steps=steps, generator=noise, output_type="np")

    return run


def evaluations(pipe: DiffusionPipeline, steps: int) -> int:
    """How often a trajectory of `steps` steps evaluates the network, in each context: 2 a step for Heun, one but last.

    Raises: ConfigError where the scheduler wants to know more than the steps.
    """
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    try:
        scheduler.set_timesteps(steps)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{type(scheduler).__name__}: expected a scheduler that needs the number of steps alone, got one that asks "
            f"for more ({error}). Its time steps depend on the image size. Give evaluations_per_run={steps}."
        ) from error
    return len(scheduler.timesteps)
