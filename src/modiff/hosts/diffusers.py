"""The only place that knows diffusers: which components denoise, when a generation begins and ends, and contexts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from modiff.errors import ConfigError
from modiff.hosts import quantizer as quantizer  # enters modiff into diffusers' tables of quantization methods
from modiff.hosts.contexts import follow_cache_context
from modiff.model.attach import attachment_of, eager
from modiff.model.trajectory import model_trajectory

DENOISERS = ("unet", "transformer", "transformer_2", "prior")
"""Component names under which pipelines keep the networks that run at every step."""

_MARK = "_modiff_pipeline"


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks that a pipeline evaluates at every step, by component name.

    Raises: ConfigError if the pipeline has none under a known name.
    """
    found = {n: eager(m) for n in DENOISERS if isinstance(m := getattr(pipe, n, None), nn.Module)}
    if not found:
        parts = ", ".join(sorted(pipe.components))
        raise ConfigError(
            f"{type(pipe).__name__}: expected a component named {', '.join(DENOISERS)}, got {parts}. This pipeline "
            "names its denoiser otherwise. Apply to the module itself and use `with modiff.trajectory(module):`."
        )
    return found


@contextmanager
def pipeline_trajectory(pipe: DiffusionPipeline) -> Iterator[None]:
    """One generation of all modulated denoisers of a pipeline."""
    with ExitStack() as stack:
        for model in denoisers(pipe).values():
            if attachment_of(model) is not None:
                stack.enter_context(model_trajectory(model))
        yield


def attach(pipe: DiffusionPipeline) -> None:
    """Make every `pipe(...)` a trajectory: states start empty and are freed at its end, also when it raises.

    Python looks `__call__` up on the class, so the pipeline gets a subclass of the same name that wraps it.
    """
    for model in denoisers(pipe).values():
        follow_cache_context(model)
    if is_attached(pipe):  # modiff was taken off its networks one by one
        return
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        with pipeline_trajectory(self):
            return kind.__call__(self, *args, **kwargs)

    names = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__, _MARK: kind}
    pipe.__class__ = type(kind.__name__, (kind,), names)


def detach(pipe: DiffusionPipeline) -> None:
    """Give the pipeline its own class back."""
    pipe.__class__ = getattr(type(pipe), _MARK, type(pipe))


def is_attached(pipe: DiffusionPipeline) -> bool:
    """Whether `attach` was called on this pipeline."""
    return _MARK in vars(type(pipe))


def unconditional_run(pipe: DiffusionPipeline, steps: int, num_images: int, seed: int) -> Callable[[], object]:
    """A function that generates `num_images` images with a pipeline that needs no prompt.

    Raises: ConfigError if the pipeline needs one.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed or "batch_size" not in parameters or "prompt" in parameters:
        raise ConfigError(
            f"{type(pipe).__name__}: expected a pipeline without a prompt, got one that takes "
            f"{', '.join(needed) or 'a prompt'}. modiff does not invent inputs. Give run=lambda: pipe(...)."
        )

    def run() -> object:
        generator = torch.Generator("cpu").manual_seed(seed)
        return pipe(batch_size=num_images, num_inference_steps=steps, generator=generator, output_type="np")

    return run
