"""From a layer and its config to the words of the reference recursion, and a layer run through a trajectory."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modiff import LayerConfig, ModiffConfig
from modiff.nn import Clock, ModulatedLayer, quantized_class
from tests.reference import layers
from tests.reference.hadamard import along, rotation
from tests.reference.quantizer import quantize_weight
from tests.reference.recursion import Recipe

Operator = Callable[[Tensor], Tensor]


def recipe_for(config: LayerConfig, operator: Operator, bias: Tensor | float, **facts: Any) -> Recipe:
    """The recipe of a modulated layer with dynamic scales; `facts` are the fields of Recipe that no config decides."""
    loop, activation = config.modulation, config.activation
    assert loop is not None
    assert activation.dynamic
    rounds = loop.rounds if loop.first_step == "coded" else 0
    settings = {
        "anchor": operator, "channel_dim": -1, "matrix": None, "bits": activation.bits, "clip": activation.clip,
        "symmetric": activation.symmetric, "predictor": loop.predictor, "gain": loop.gain, "rounds": rounds,
        "compensated": loop.error_compensation == "closed_loop", "reanchor_every": loop.reanchor_every,
    }  # fmt: skip
    return Recipe(**settings | {"operator": operator, "bias": bias} | facts)


def torch_operator(layer: nn.Module, weight: Tensor) -> Operator:
    """The linear part of a torch layer with a given weight, by explicit loops."""
    if isinstance(layer, nn.Linear):
        return lambda x: layers.linear(x, weight)
    return lambda x: layers.conv(
        x, weight, stride=layer.stride, padding=layer.padding, dilation=layer.dilation,
        groups=layer.groups, mode=layer.padding_mode,
    )  # fmt: skip


def recipe_of_layer(layer: nn.Module, config: LayerConfig, split: int | None = None) -> Recipe:
    """The recipe of a modulated layer, derived from its torch layer alone."""
    linear = isinstance(layer, nn.Linear)
    groups, fan_in = 1 if linear else layer.groups, layer.weight.shape[1]
    channels = fan_in * groups
    runs = (channels,) if split is None else (split, channels - split)
    weight, matrix = layer.weight.detach().double(), None
    if config.rotation == "hadamard":
        matrix = rotation(runs, config.rotation_block, groups)
        weight = along(weight, matrix[:fan_in, :fan_in].T, 1)  # W R; the blocks of all groups are alike
    exact, weight = weight, quantize_weight(weight, config.weight.bits, runs if split is not None else ())
    bias = 0.0
    if layer.bias is not None:
        bias = layer.bias.detach().double().reshape(-1, *[1] * (weight.dim() - 2))
    granularity = config.activation.granularity.replace("auto", "token" if linear else "sample")
    return recipe_for(
        config, torch_operator(layer, weight), bias, runs=runs, granularity=granularity,
        channel_dim=-1 if linear else 1, matrix=matrix,
        anchor=torch_operator(layer, exact if config.modulation.anchor_weights == "exact" else weight),
    )  # fmt: skip


def quantized(layer: nn.Module, config: LayerConfig, split: int | None = None, name: str = "layer") -> ModulatedLayer:
    """The modulated layer of a torch layer, with its own clock."""
    kind = quantized_class(layer)
    assert kind is not None
    return kind.from_float(layer, config, name=name, clock=Clock("model"), split=split)


def evaluate(layer: ModulatedLayer, x: Tensor, timestep: float | None = None) -> Tensor:
    """One evaluation of a network that is this layer alone."""
    layer.clock.call(timestep)
    try:
        return layer(x)
    finally:
        layer.clock.returned()


class LayerState(NamedTuple):
    """Both states of a layer: â_t and ô_t."""

    input: Tensor
    output: Tensor


def state_of(layer: ModulatedLayer) -> LayerState:
    """Both states of the present context, as one tensor each."""
    memory = layer.loop.memories[layer.clock.context, 0]
    output = memory.output.value
    return LayerState(memory.input.state.value, output() if callable(output) else output)


def play(
    layer: ModulatedLayer, inputs: Sequence[Tensor], timesteps: Sequence[float] | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(output, input state, output state) of each step of one trajectory."""
    steps = []
    layer.clock.start()
    for t, x in enumerate(inputs):
        output = evaluate(layer, x, None if timesteps is None else timesteps[t])
        steps.append((output, *(s.clone() for s in state_of(layer))))
    layer.clock.stop()
    return steps


def sizes_of(timesteps: Sequence[float]) -> list[float]:
    """Step size before each input; the first has none."""
    return [0.0, *(abs(b - a) for a, b in itertools.pairwise(timesteps))]


def float64(config: LayerConfig) -> LayerConfig:
    """The same config with float64 states, so that only the method is compared and not the arithmetic."""
    modulation = None if config.modulation is None else dataclasses.replace(config.modulation, state_dtype="float64")
    return dataclasses.replace(config, modulation=modulation)


def quantized_anchors(config: ModiffConfig) -> ModiffConfig:
    """The config in the paper's form, whose outputs packing does not change."""

    def of(layer: LayerConfig) -> LayerConfig:
        if layer.modulation is None:
            return layer
        return dataclasses.replace(layer, modulation=dataclasses.replace(layer.modulation, anchor_weights="quantized"))

    overrides = tuple((pattern, of(layer)) for pattern, layer in config.overrides)
    return dataclasses.replace(config, layer=of(config.layer), overrides=overrides)


def randomised(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer with drawn weights, independent of the global random state."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return layer
