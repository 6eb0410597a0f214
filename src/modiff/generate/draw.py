"""Images of a pipeline by index: what `modiff sample` and `modiff generate` have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from diffusers import DiffusionPipeline

from modiff.errors import ConfigError, StateError
from modiff.generate.conditions import Conditions
from modiff.hosts.diffusers.runs import call_inputs, noise_generators


def draw(
    pipe: DiffusionPipeline, indices: Sequence[int], *, steps: int, seed: int, conditions: Conditions
) -> np.ndarray:
    """(N, H, W, C) in [0, 1]: the image of each index, from the noise of seed + index, of its prompt or class.

    Raises: ConfigError for inputs that the pipeline cannot take.
    """
    prompts, labels = conditions.prompts_of(indices), conditions.labels_of(indices)
    inputs = call_inputs(pipe, len(indices), prompt=prompts, label=labels)
    result = pipe(**inputs, num_inference_steps=steps, generator=noise_generators(seed, indices), output_type="np")
    return np.asarray(result.images)


def check_finite(images: np.ndarray, first: int) -> None:
    """Raises: StateError that names the image `first` if pixels are NaN or infinite."""
    if not np.isfinite(images).all():
        raise StateError(
            f"image {first}: expected finite pixels, got NaN or infinity. The generation diverged. Use more "
            "activation bits, or leave --config out to see whether the model itself is sound."
        )


def check_steps(pipe: DiffusionPipeline, steps: int) -> None:
    """Raises: ConfigError for more steps than the model was trained with."""
    most = pipe.scheduler.config.num_train_timesteps
    if steps > most:
        raise ConfigError(
            f"--steps: expected at most {most}, got {steps}. The model was trained on no more. Use --steps 50."
        )
