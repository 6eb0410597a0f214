"""Both networks at each step of the same trajectories: states, samplers with a memory, noise, and resuming."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import modiff
from modiff import ConfigError, FormatError
from modiff.model.trajectory import clone
from modiff.sampling.lockstep import Batch, Step, lockstep
from tests.helpers import assert_same_bits, relative_error
from tests.hosts.tiny import make_scheduler
from tests.methods import small

STEPS = 4


def own_way(step: Step) -> dict[str, Tensor]:
    step.next = step.advance(step.output)
    return {"difference": step.output - step.full_output, "state": step.state}


def with_full_precision(step: Step) -> dict[str, Tensor]:
    step.next = step.full_next
    return {"state": step.state}


class Pair:
    """The small pipeline in full precision, and quantized; what was evaluated is counted."""

    def __init__(self, preset: str = "w8a4", batches: int = 1, scheduler: str = "ddim") -> None:
        pipe = small.build()
        self.full, self.network, self.evaluated = clone(pipe.unet), pipe.unet, {"full": 0, "quantized": 0}
        self.pipe, self.scheduler = pipe, make_scheduler(scheduler, "sample")
        if preset:
            modiff.apply(pipe, preset)
        self.scheduler.set_timesteps(STEPS)
        noise = torch.cat([torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
        self.batches = [Batch(part, self._predict("full", self.full), self._predict("quantized", self.network))
                        for part in noise.chunk(batches)]  # fmt: skip

    def _predict(self, name, network):
        def predict(step: int, state: Tensor) -> Tensor:
            self.evaluated[name] += 1
            return network(state, self.scheduler.timesteps[step]).sample

        return predict

    def run(self, visit=own_way, folder: Path | None = None, eta: float = 0.0) -> list[dict[str, Tensor]]:
        return lockstep(
            self.scheduler, self.batches, visit, network=self.network, folder=folder, eta=eta, progress=False
        )


def test_the_quantized_state_is_that_of_the_pipeline_with_its_states_open_all_along():
    pair = Pair()
    results = pair.run()
    states = small.states_of(pair.pipe, steps=STEPS, batch=2)
    for result, state in zip(results, states, strict=True):
        assert relative_error(result["state"], state) < 1e-6
    modiff.remove(pair.pipe)
    exact = small.states_of(pair.pipe, steps=STEPS, batch=2)
    assert relative_error(results[-1]["state"], exact[-1]) > 1e-3
    on_track = Pair().run(with_full_precision)
    assert max(relative_error(r["state"], s) for r, s in zip(on_track, exact, strict=True)) < 1e-6


@pytest.mark.parametrize("preset", ["w8a4", ""])
def test_it_does_not_matter_how_samples_are_divided_and_equal_networks_stay_together(preset):
    whole, divided = Pair(preset).run(), Pair(preset, batches=2).run()
    for one, two in zip(whole, divided, strict=True):
        assert relative_error(two["state"], one["state"]) < 1e-6
    assert (whole[-1]["difference"].abs().max() > 0) == bool(preset)  # at the first step anchors are exact


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++2m"])
@pytest.mark.parametrize("preset", ["w8a4", ""])
def test_a_killed_run_goes_on_to_the_same_bits_without_full_precision_again(scheduler, preset, tmp_path):
    eta = float(scheduler == "ddim")
    expected, killed = Pair(preset, scheduler=scheduler).run(eta=eta), Pair(preset, scheduler=scheduler)

    def until_the_third(step: Step) -> dict[str, Tensor]:
        if step.index == 2:
            raise KeyboardInterrupt
        return own_way(step)

    with pytest.raises(KeyboardInterrupt):
        killed.run(until_the_third, tmp_path, eta)
    killed.evaluated = {"full": 0, "quantized": 0}
    results = killed.run(own_way, tmp_path, eta)
    assert killed.evaluated == {"full": 2, "quantized": 2 + (STEPS if preset else 2)}  # two for the record
    for result, other in zip(results, expected, strict=True):
        assert_same_bits(result["state"], other["state"])
    assert [p.name for p in sorted(tmp_path.glob("step*"))] == [f"step-{i:04d}.safetensors" for i in range(STEPS)]


def test_noise_is_the_same_in_both_trajectories_and_not_that_of_another_step_or_seed():
    pair, noise = Pair(""), []
    pair.scheduler = DDIMScheduler.from_config(pair.scheduler.config)
    pair.scheduler.set_timesteps(STEPS)

    def visit(step: Step) -> dict[str, Tensor]:
        told = step.full_output, step.timestep, step.full_state
        still = pair.scheduler.step(*told, eta=1.0, variance_noise=torch.zeros_like(step.full_state)).prev_sample
        noise.append((step.full_next - still).flatten())
        return own_way(step)

    noisy = pair.run(visit, eta=1.0)
    assert abs(float(torch.cosine_similarity(noise[0], noise[1], dim=0))) < 0.3
    assert not torch.equal(noisy[-1]["state"], pair.run()[-1]["state"])
    assert all(r["difference"].abs().max() == 0 for r in noisy)
    other = lockstep(pair.scheduler, pair.batches, own_way, network=pair.network, eta=1.0, seed=1, progress=False)
    assert not torch.equal(other[-1]["state"], noisy[-1]["state"])


def test_what_cannot_go_on_is_refused(tmp_path):
    pair = Pair("")
    with pytest.raises(ConfigError, match=r"lockstep\.visit: expected a next state, got None"):
        pair.run(lambda step: {})
    with pytest.raises(ConfigError, match=r"lockstep\.advance: expected one call a step"):
        pair.run(lambda step: {"a": step.advance(step.output), "b": step.advance(step.output)})
    pair.run(folder=tmp_path)
    pair.scheduler.set_timesteps(3)
    with pytest.raises(ConfigError, match=r"got one with another .*steps"):
        pair.run(folder=tmp_path)
    pair.scheduler.set_timesteps(STEPS)
    (tmp_path / "step-0001.safetensors").write_bytes(b"half")
    with pytest.raises(FormatError, match="expected a finished step"):
        pair.run(folder=tmp_path)
