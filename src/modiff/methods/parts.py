"""What the published methods have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from modiff.api import remove
from modiff.config import LayerConfig, WeightConfig
from modiff.errors import ConfigError, StateError
from modiff.hosts.host import host_of, networks_of
from modiff.model.attach import attachment_of, required_attachment
from modiff.model.select import CANDIDATES
from modiff.nn.weight import QuantizedWeight

BOUNDARY_BITS = 8
"""The published codes keep the first and the last layer of a network at 8 bits."""


def plain_network(target: Any, method: str) -> nn.Module:
    """The one denoiser of a pipeline, or a module, without modiff on it. Raises: ConfigError or StateError."""
    modules = networks_of(target)
    if len(modules) != 1:
        raise ConfigError(
            f"{method}: expected a pipeline with one denoiser, got {', '.join(modules)}. Calibration data belong to "
            "one network. Apply the method to each: apply(pipe.transformer, config, run=...)."
        )
    model = next(iter(modules.values()))
    if attachment_of(model) is not None:
        raise StateError(
            f"{method}: expected a full-precision model, got a {type(model).__name__} with modulated layers. It is "
            "calibrated against full precision. Call modiff.remove first."
        )
    return model


def boundary_overrides(model: nn.Module, layer: LayerConfig) -> tuple[tuple[str, LayerConfig], ...]:
    """`layer` with 8 bits for the first and the last layer of the network; nothing that has 8 bits or more changes."""
    names = [name for name, module in model.named_modules() if isinstance(module, CANDIDATES)]
    weight, activation = layer.weight.bits, layer.activation.bits
    raised = dataclasses.replace(
        layer,
        weight=layer.weight if weight is None else WeightConfig(bits=BOUNDARY_BITS, search=layer.weight.search),
        activation=layer.activation if activation is None
        else dataclasses.replace(layer.activation, bits=BOUNDARY_BITS),
    )  # fmt: skip
    return tuple((name, raised) for name in dict.fromkeys([*names[:1], *names[-1:]]))


def trajectories_of(
    target: Any,
    run: Callable[[int], object] | None,
    evaluations: int | None,
    *,
    steps: int,
    batch: int,
    seed: int,
) -> tuple[Callable[[int], object], int]:
    """What runs trajectory i, and how often that evaluates the network: as given, or as the pipeline says.

    Raises: ConfigError where a module alone, or a pipeline with a prompt, cannot say.
    """
    host = host_of(target)
    run = run or host.run(target, steps=steps, batch=batch, seed=seed)
    return run, evaluations or host.evaluations(target, steps)


def keep_rounding(model: nn.Module) -> None:
    """Keep the present codes of all weights, as if they were learned: no other weight is taken for them."""
    for quantized in required_attachment(model, "keep_rounding").layers.values():
        weight = quantized.quantized_weight
        if isinstance(weight, QuantizedWeight) and weight.config.bits is not None and not weight.fixed:
            weight.fix(weight.codes(quantized.weight))


@contextmanager
def undone_on_error(target: Any) -> Iterator[None]:
    """Take modiff off again if the body raises: a model with half of a method on it is no model of anyone's."""
    try:
        yield
    except BaseException:
        remove(target)
        raise
