"""Two tiny networks on fixed weights, eight steps each: what the golden files hold.

Everything is float64, and weights and noise are closed formulas, so another machine or torch version differs by the
rounding of the last bits only, never by a code.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

import modiff
from modiff.model.attach import required_attachment
from tests.recipes import state_of

HERE = Path(__file__).parent
STEPS = 8
Network = tuple[nn.Module, Tensor, Callable[[nn.Module, Tensor, int], Tensor], list[str]]
"""(model, first sample, how a model is evaluated at a step, the layers to watch)."""


def with_modulation(config: modiff.ModiffConfig, **changes: Any) -> modiff.ModiffConfig:
    """The config with another closed loop."""
    modulation = dataclasses.replace(config.layer.modulation or modiff.ModulationConfig(), **changes)
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=modulation))


MODES = {
    "published_a4": modiff.presets.published(8, 4),
    "tuned_a3": with_modulation(modiff.presets.tuned(8, 3), anchor_weights="quantized", predictor="linear", gain=0.8),
    "plain_a4": modiff.presets.plain(8, 4),
    "exact_w4a4": with_modulation(modiff.presets.modulated(4, 4), reanchor_every=3),
}


def wave(shape: torch.Size | tuple[int, ...], phase: float, size: float) -> Tensor:
    """size * sin of an irrational ramp: fixed numbers that look random enough."""
    count = torch.Size(shape).numel()
    return (size * torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * 12.9898 + phase)).reshape(shape)


def fill(model: nn.Module) -> nn.Module:
    """Fixed weights of a sane size in every parameter, in float64."""
    model = model.double().eval()
    for index, parameter in enumerate(model.parameters()):
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        scale = 1.2 / fan_in**0.5 if parameter.dim() > 1 else 0.2
        parameter.data = wave(parameter.shape, index, scale) + (1.0 if parameter.dim() == 1 else 0.0) * (index % 2)
    return model


def unet() -> Network:
    """A U-Net with a skip connection, attention and a split shortcut."""
    model = fill(
        UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8, norm_num_groups=4,
        )
    )  # fmt: skip

    def evaluate(model: nn.Module, x: Tensor, step: int) -> Tensor:
        return model(x, 1000 - 125 * step).sample

    watched = ["down_blocks.0.resnets.0.conv2", "up_blocks.0.resnets.0.conv1", "mid_block.attentions.0.to_k"]
    return model, wave((2, 1, 8, 8), 0.5, 1.0), evaluate, watched


def dit() -> Network:
    """A class-conditional transformer."""
    model = fill(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
        )
    )  # fmt: skip

    def evaluate(model: nn.Module, x: Tensor, step: int) -> Tensor:
        t = torch.full((x.shape[0],), 1000 - 125 * step)
        return model(x, timestep=t, class_labels=torch.tensor([1, 2])).sample

    watched = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"]
    return model, wave((2, 2, 8, 8), 0.5, 1.0), evaluate, watched


NETWORKS = {"unet": unet, "dit": dit}


def record(network: str, mode: str) -> dict[str, Tensor]:
    """Inputs, states of the watched layers and outputs of every step."""
    model, x, evaluate, watched = NETWORKS[network]()
    config = MODES[mode]
    if config.layer.modulation is not None:
        config = with_modulation(config, state_dtype="float64")
    modiff.apply(model, config)
    found: dict[str, Tensor] = {}
    with torch.no_grad(), modiff.trajectory(model):
        for step in range(STEPS):
            found[f"{step}.x"] = x
            output = evaluate(model, x, step)
            found[f"{step}.output"] = output
            found.update({f"{step}.{key}": value for key, value in _states(model, watched)})
            x = x - 0.1 * output / output.std()
    modiff.remove(model)
    return {key: value.contiguous().clone() for key, value in found.items()}


def _states(model: nn.Module, watched: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The first sample's states; plain layers have none."""
    for name in watched:
        layer = required_attachment(model, "golden").layers[name]
        if layer.loop.memories:
            yield f"{name}.input", state_of(layer).input[0].float()
            yield f"{name}.output", state_of(layer).output[0].float()
