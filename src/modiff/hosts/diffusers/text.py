"""Text models and their pipelines from diffusers: they save and load as other models of diffusers do."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modiff.errors import ConfigError
from modiff.hosts.diffusers.host import DiffusersHost
from modiff.hosts.text import TextHost, text_network


class DiffusersTextHost(TextHost, DiffusersHost):
    """A call of a pipeline is a trajectory, or of another method that its class names as `generation`."""

    def __init__(self, generation: str) -> None:
        self.generation = generation

    def networks(self, target: Any) -> dict[str, nn.Module]:
        """`model` of a pipeline, or the model itself."""
        network = text_network(target)
        return super().networks(target) if network is None or isinstance(target, nn.Module) else {"model": network}

    def run(self, target: Any, *, steps: int, batch: int, seed: int) -> Callable[[int], object]:
        """Of a pipeline whose text begins with masks alone, as `MaskedTextPipeline`'s."""
        if not {"batch_size", "num_inference_steps", "generator"} <= inspect.signature(target).parameters.keys():
            raise ConfigError(
                f"{type(target).__name__}: expected run=, a function that runs one trajectory, got none. How its text "
                "begins is not known. Give run=lambda i: pipe(...)."
            )

        def run(index: int) -> object:
            generator = torch.Generator().manual_seed(seed + index)
            return target(batch_size=batch, num_inference_steps=steps, generator=generator)

        return run

    def evaluations(self, target: Any, steps: int) -> int:
        """One a step, at most."""
        return steps
