"""Schedulers that add fresh noise at few steps: modulated networks are never worse than plain ones."""

from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from tests.helpers import relative_error
from tests.hosts.tiny import SMALL

SCHEDULERS: dict[str, Callable[[], diffusers.SchedulerMixin]] = {
    "lcm": diffusers.LCMScheduler,
    "tcd": lambda: diffusers.TCDScheduler(steps_offset=1),
    "consistency": lambda: diffusers.CMStochasticIterativeScheduler(sigma_max=20.0),
    "ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
}
STEPS = 6


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return SMALL.build().unet.eval()


def evaluations(network: nn.Module, name: str) -> list[tuple[Tensor, float]]:
    """Samples and timesteps of the network in full precision."""
    scheduler, noise = SCHEDULERS[name](), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(STEPS)
    size = network.config.sample_size
    x = torch.randn((4, network.config.in_channels, size, size), generator=noise) * scheduler.init_noise_sigma
    seen: list[tuple[Tensor, float]] = []
    for index, t in enumerate(scheduler.timesteps):
        seen.append((scheduler.scale_model_input(x, t), 999.0 - index))
        with torch.no_grad():
            x = scheduler.step(network(*seen[-1]).sample, t, x, generator=noise).prev_sample
    return seen


def outputs(network: nn.Module, seen: list[tuple[Tensor, float]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([network(*each).sample for each in seen])


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_modulated_networks_are_never_worse_than_plain_ones(network, name, bits, dynamic):
    seen = evaluations(network, name)
    exact, errors = outputs(network, seen)[1:], []
    for modulation in (None, ModulationConfig()):
        activation = QuantizerConfig(bits=bits[1], dynamic=dynamic)
        layer = LayerConfig(weight=WeightConfig(bits=bits[0]), activation=activation, modulation=modulation)
        modiff.apply(network, ModiffConfig(layer=layer))

        def run() -> Tensor:
            with modiff.trajectory(network):
                return outputs(network, seen)

        if not dynamic:
            modiff.calibrate(network, run)
        errors.append(relative_error(run()[1:], exact))
        modiff.remove(network)
    assert errors[1] <= 1.02 * errors[0]
