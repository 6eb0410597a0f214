"""Networks of no pipeline: other names and orders of arguments, several tensors that move, several networks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import ConfigError, StateError
from modiff.model import facts
from modiff.model.attach import attachment_of
from modiff.model.trajectory import state_bytes
from tests.helpers import relative_error

TIMES = torch.linspace(1.0, 0.1, 8)


class Molecule(nn.Module):
    """Features and coordinates of atoms, both of which move; returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.last = (
            nn.Linear(11, 32), nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 11),
        )  # fmt: skip

    def forward(self, noise_labels: Tensor, features: Tensor, positions: Tensor) -> dict[str, Tensor]:
        h = self.first(torch.cat([features, positions], -1)) + noise_labels
        h = self.last(h + self.down(torch.relu(self.up(h))))
        return {"features": h[..., :8], "positions": h[..., 8:]}


def molecule() -> nn.Module:
    torch.manual_seed(0)
    return Molecule().eval()


@torch.no_grad()
def denoise(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    features, positions = (torch.randn(5, n, generator=generator) for n in (8, 3))
    for time in TIMES:
        step = model(time.expand(5, 1), features, positions)
        features, positions = features - 0.1 * step["features"], positions - 0.1 * step["positions"]
    return torch.cat([features, positions], -1)


def sets_of_states(model: nn.Module) -> float:
    """In the units of one set: the input and the output of each of the two layers."""
    return state_bytes(model) / (4 * 5 * (32 + 64 + 64 + 32))


def test_in_a_context_that_a_loop_names_everything_may_move_and_there_is_one_set_of_states():
    model = molecule()
    exact = denoise(model)
    modiff.apply(model, "w8a8")
    with modiff.trajectory(model), modiff.context(model, "atoms"):
        output = denoise(model)
        assert sets_of_states(model) == 1
        assert attachment_of(model).clock.step == len(TIMES) - 1
        assert float(attachment_of(model).clock.ratio) == pytest.approx(1, rel=1e-4)
    assert relative_error(output, exact) < 1e-3


def test_a_column_of_times_before_the_sample_is_not_the_sample():
    model = molecule()
    modiff.apply(model, "w8a8")
    x = torch.randn(5, 8)
    with modiff.trajectory(model), torch.no_grad():
        for time in TIMES[:4]:
            x = x - 0.1 * model(time.expand(5, 1), x, torch.ones(5, 3))["features"]
        assert sets_of_states(model) == 1


def test_tune_measures_a_network_that_returns_a_dictionary():
    model = molecule()
    config = modiff.tune(model, 4, run=lambda: denoise(model))
    exact = denoise(model)
    modiff.apply(model, config)
    with modiff.trajectory(model):
        assert relative_error(denoise(model), exact) < 0.01


class Sampler:
    """Two networks, one for each half of the time."""

    def __init__(self) -> None:
        self.early, self.late = molecule(), molecule()

    @torch.no_grad()
    def sample(self, steps: int = 8, batch: int = 5, seed: int = 0) -> Tensor:
        x, positions = torch.randn(batch, 8, generator=torch.Generator().manual_seed(seed)), torch.ones(batch, 3)
        for time in torch.linspace(1.0, 0.1, steps):
            network = self.early if time > 0.5 else self.late
            x = x - 0.1 * network(time.expand(batch, 1), x, positions)["features"]
        return x


class SamplerHost(modiff.Host):
    generation = "sample"

    def networks(self, target: object) -> dict[str, nn.Module]:
        return {"early": target.early, "late": target.late} if isinstance(target, Sampler) else super().networks(target)

    def run(self, target: Sampler, *, steps: int, batch: int, seed: int) -> Callable[[int], object]:
        return lambda index: target.sample(steps, batch, seed + index)


def test_a_sampler_of_two_networks_is_one_target_and_each_network_one_too(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "_FINDERS", [*facts._FINDERS])  # what the test registers goes with it
    host = SamplerHost()
    modiff.register_host(lambda target: host if isinstance(target, (Sampler, Molecule)) else None)
    sampler = Sampler()
    exact = sampler.sample()
    modiff.apply(sampler, modiff.tune(sampler, 8, steps=8))
    assert relative_error(sampler.sample(), exact) < 0.01
    with pytest.raises(ConfigError, match="save: expected a torch module or a pipeline of diffusers, got Sampler"):
        modiff.save(sampler, tmp_path / "all")
    modiff.save(sampler.early, tmp_path / "early")
    modiff.remove(sampler)
    sampler.early = modiff.load(tmp_path / "early", into=molecule())
    with modiff.trajectory(sampler):
        assert relative_error(sampler.sample(), exact) < 0.05


def test_networks_without_a_host_are_taken_one_by_one():
    sampler = Sampler()
    exact = sampler.sample()
    with pytest.raises(ConfigError, match=r"got list.*take the networks of a sampler one by one"):
        modiff.apply([sampler.early, sampler.late], "w8a8")
    for network in (sampler.early, sampler.late):
        modiff.apply(network, "w8a8")
    with modiff.trajectory(sampler.early), modiff.trajectory(sampler.late):
        assert relative_error(sampler.sample(), exact) < 0.01


def test_a_loop_that_calls_a_module_inside_is_told_what_to_apply_modiff_to():
    whole = nn.ModuleDict({"net": molecule()})
    modiff.apply(whole, "w8a8")
    with (
        modiff.trajectory(whole),
        pytest.raises(StateError, match="expected a call of ModuleDict, got one"),
    ):
        denoise(whole["net"])
