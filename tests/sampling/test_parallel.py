"""Parallel sampling: the toy whose iterations are known, and the bits of the sequential sampler."""

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from modiff import ConfigError
from modiff.sampling.corrected import Correction, corrected
from modiff.sampling.parallel import ParallelSampler, Sampled, rows_of, spread, variances
from tests.helpers import assert_same_bits, relative_error

KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}, {}),
    "DDIM, noisy": ("DDIMScheduler", {"timestep_spacing": "trailing"}, {"eta": 0.8}),
    "DDIM, another end": ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}, {}),
    "DDPM": ("DDPMScheduler", {"variance_type": "fixed_large"}, {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}, {}),
    "DPM-Solver++ 3M, Karras": ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, {}),
    "SDE-DPM-Solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "DDIM of diffusers' own": ("DDIMParallelScheduler", {"clip_sample": True}, {}),
}


class Mixture:
    """256 independent mixtures of three normals, with the exact noise in float64, row by row.

    The reference names neither means nor deviation; these give the iterations that it prints.
    """

    means, deviation = torch.tensor([-0.8, 0.1, 0.7], dtype=torch.float64), 0.1

    def __init__(self, alphas: Tensor) -> None:
        self.alphas = alphas.double()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha = self.alphas[t].reshape(-1, 1, 1)
        variance = alpha * self.deviation**2 + 1 - alpha
        away = x.unsqueeze(-1) - alpha.sqrt() * self.means
        shares = torch.softmax(-(away**2) / (2 * variance), -1)
        return (shares * away / variance).sum(-1) * (1 - alpha[..., 0]).sqrt()


def scheduler_of(name: str) -> tuple[Any, dict[str, Any]]:
    kind, settings, step = KINDS[name]
    clips = {"clip_sample": False} if kind.startswith("DD") else {}
    return getattr(diffusers, kind)(**clips | settings), step


def sequential(scheduler: Any, denoise: Callable, x: Tensor, steps: int, generator: Any, **settings) -> Tensor:
    scheduler = copy.copy(scheduler)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, t.repeat(len(x))), t, x, generator=generator, **settings).prev_sample
    return x


def noise(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, 256, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TABLE = [
    (50, 10, (9, 66, 5.1e-3), (11, 85, 1.3e-4)),  # 9, 65, 2.8e-3; 11, 89, 1.4e-4
    (50, 50, (6, 93, 9.9e-4), (7, 121, 2.0e-4)),  # 6, 90, 1.4e-3; 7, 121, 1.2e-4
    (200, 10, (25, 242, 3.3e-3), (32, 307, 3.1e-4)),  # 25, 241, 2.9e-3; 32, 311, 3.8e-4
    (200, 200, (8, 427, 4.6e-4), (10, 548, 6.0e-5)),  # 8, 426, 8.8e-4; 10, 568, 1.2e-4
]
"""Steps, window; iterations, evaluations and relative L2 at tolerances .1 and .01, next to those of the reference.

Its iterations are met, its evaluations to 5 %, its errors to a factor of 2: they hang on the noise, which it does not
name.
"""


@pytest.mark.parametrize(("steps", "window", *"ab"), TABLE)
def test_the_toy_takes_the_iterations_that_are_known(steps: int, window: int, a: tuple, b: tuple) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    denoise, x = Mixture(scheduler.alphas_cumprod), torch.tensor(np.random.default_rng(7).normal(size=(1, 256)))
    reference = sequential(scheduler, denoise, x, steps, None)
    for tolerance, (*counts, error) in ((0.1, a), (0.01, b)):
        result = ParallelSampler(scheduler, window, tolerance)(rows_of(denoise), x, steps)
        assert [result.iterations, result.evaluations] == counts
        assert relative_error(result.sample, reference) == pytest.approx(error, rel=0.03)
    exact = ParallelSampler(scheduler, window, 0.0)(rows_of(denoise), x, steps)
    assert_same_bits(exact.sample, reference)
    assert exact.iterations < steps


def sampled(name: str, tolerance: float, *, steps: int = 12, window: int = 5) -> tuple[Sampled, Tensor]:
    """What the parallel and the sequential sampler give, and that both leave the generator alike."""
    scheduler, settings = scheduler_of(name)
    ours, theirs = ([torch.Generator().manual_seed(7 + i) for i in range(2)] for _ in range(2))
    denoise, x = Mixture(scheduler.alphas_cumprod), noise(2)
    result = ParallelSampler(scheduler, window, tolerance)(rows_of(denoise), x, steps, generator=ours, **settings)
    reference = sequential(scheduler, denoise, x, steps, theirs, **settings)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs, strict=True))
    return result, reference


@pytest.mark.parametrize("name", KINDS)
def test_tolerance_0_gives_the_bits_of_the_sequential_sampler(name: str) -> None:
    result, reference = sampled(name, 0.0)
    assert_same_bits(result.sample, reference)
    assert result.iterations <= 12


@pytest.mark.parametrize("name", KINDS)
def test_a_tolerance_saves_iterations_and_costs_little(name: str) -> None:
    result, reference = sampled(name, 0.1, steps=50, window=20)
    assert result.iterations <= 25
    assert 0 < relative_error(result.sample, reference) < 0.03
    assert 50 < result.evaluations <= 20 * result.iterations


@pytest.mark.parametrize(("window", "iterations"), [(1, 12), (12, 12), (100, 12)])
def test_a_window_is_at_most_the_steps_and_one_row_is_the_sequential_sampler(window: int, iterations: int) -> None:
    result, reference = sampled("DDIM", 0.0, window=window)
    assert_same_bits(result.sample, reference)
    assert result.iterations <= iterations
    assert window > 1 or (result.iterations, result.evaluations) == (12, 12)


def test_variances_are_those_of_ddpm_and_the_last_step_has_one() -> None:
    scheduler = diffusers.DDPMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    expected = torch.stack([scheduler._get_variance(t) for t in scheduler.timesteps[:-1]])
    assert relative_error(variances(scheduler)[:-1], expected) < 1e-5
    assert variances(scheduler)[-1] == variances(scheduler)[-2]


def test_rows_spread_over_several_evaluators_in_their_order() -> None:
    scheduler, _ = scheduler_of("DDIM")
    denoise, x, runs = Mixture(scheduler.alphas_cumprod), noise(2), []

    def watched(number: int) -> Callable:
        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            runs.append((number, t.tolist()))
            return rows_of(denoise, "cpu")(x, t)

        return evaluate

    sampler = ParallelSampler(scheduler, 7, 0.1)
    spread_result = sampler(spread([watched(0), watched(1), watched(2)]), x, 20)
    result = sampler(rows_of(denoise), x, 20)
    assert_same_bits(spread_result.sample, result.sample)
    scheduler.set_timesteps(20)
    assert sorted(runs[:3]) == [(i, times.tolist()) for i, times in enumerate(scheduler.timesteps[:7].split([3, 2, 2]))]


def test_the_window_tells_how_far_it_moved_and_nothing_of_the_scheduler_changes() -> None:
    scheduler, _ = scheduler_of("DPM-Solver++ 2M")
    before, moved = dict(vars(scheduler)), []
    evaluate = rows_of(Mixture(scheduler.alphas_cumprod))
    result = ParallelSampler(scheduler)(evaluate, noise(1), 20, advanced=lambda *now: moved.append(now))
    assert all(vars(scheduler)[name] is value for name, value in before.items())
    scheduler.set_timesteps(20)
    steps, times, states = zip(*moved, strict=True)
    assert list(steps) == sorted(set(steps))
    assert steps[-1] == 20
    assert list(times) == [scheduler.timesteps[step - 1] for step in steps]
    assert torch.equal(states[-1], result.sample)


def test_a_state_that_is_put_in_place_of_another_is_what_is_returned() -> None:
    scheduler, _ = scheduler_of("DDIM")
    sampler, denoise = ParallelSampler(scheduler, 4, 0.0), rows_of(Mixture(scheduler.alphas_cumprod))
    assert sampler(denoise, noise(1), 4, advanced=lambda *now: now[-1] * 0).sample.count_nonzero() == 0


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        (diffusers.HeunDiscreteScheduler(), {}, r"ParallelSampler.scheduler: expected one of DDIM.*Use DDIMScheduler"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), {}, r"got 'FlowMatchEulerDiscreteScheduler'"),
        (diffusers.DDIMScheduler(), {"tolerance": -0.1}, r"ParallelSampler.tolerance: expected 0 or more, got -0.1"),
        (diffusers.DDIMScheduler(), {"tolerance": None}, r"ParallelSampler.tolerance: expected 0 or more, got None"),
        (diffusers.DDIMScheduler(), {"window": 0}, r"ParallelSampler.window: expected 1 or more, got 0"),
        (diffusers.DDIMScheduler(), {"window": 1.5}, r"ParallelSampler.window: expected a whole number, got 1.5"),
    ],
)
def test_what_cannot_be_served_is_refused(scheduler: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelSampler(scheduler, **settings)


@pytest.mark.parametrize(
    ("evaluate", "samples", "steps", "message"),
    [
        (lambda x, t: x, 1, 0, "ParallelSampler.steps: expected 1 or more, got 0"),
        (lambda x, t: x, 1, 2.5, "ParallelSampler.steps: expected a whole number, got 2.5"),
        (lambda x, t: x, 0, 4, r"ParallelSampler.noise: expected 1 or more samples of floats, got \(0, 256\)"),
        (lambda x, t: x[:, :1], 2, 4, r"evaluate: expected outputs of shape \(2, 4, \.\.\.\), got \(2, 1, 256\)"),
    ],
)
def test_what_cannot_be_sampled_is_refused(evaluate: Any, samples: int, steps: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelSampler(diffusers.DDIMScheduler())(evaluate, noise(2)[:samples], steps)


@pytest.mark.parametrize("name", ["DDIM", "DDIM, noisy", "DDPM", "DPM-Solver++ 2M", "SDE-DPM-Solver++"])
def test_a_corrected_scheduler_gives_its_sequential_bits(name: str) -> None:
    plain, settings = scheduler_of(name)
    plain.set_timesteps(12)
    numbers = torch.linspace(0.9, 1.0, 12)
    scaled = numbers if "noisy" in name or "DDPM" in name or "SDE" in name else None
    table = Correction.of(plain.timesteps, gain=numbers[:, None], offset=numbers[:, None] / 50,
                          shift=numbers[:, None] / 50, noise=scaled, eta=settings.get("eta"))  # fmt: skip
    scheduler, denoise = corrected(plain, table), Mixture(plain.alphas_cumprod)
    expected = sequential(scheduler, denoise, noise(2), 12, torch.Generator().manual_seed(7), **settings)
    sampler = ParallelSampler(scheduler, 5, 0.0)
    result = sampler(rows_of(denoise), noise(2), 12, generator=torch.Generator().manual_seed(7), **settings)
    assert_same_bits(result.sample, expected)
    assert (
        relative_error(expected, sequential(plain, denoise, noise(2), 12, torch.Generator().manual_seed(7), **settings))
        > 1e-3
    )


def test_nan_never_stands_still() -> None:
    sampler = ParallelSampler(diffusers.DDIMScheduler(), 5, 10.0)
    assert sampler(rows_of(lambda x, t: x * torch.nan), noise(2), 8).iterations == 8


def test_the_window_moves_on_over_the_leading_rows_that_stand_still_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modiff.sampling.parallel.variances", lambda _: torch.tensor([0.0, 1e9, 1e9, 1e9]))
    scheduler, _ = scheduler_of("DDIM")
    moved: list[int] = []
    sampler = ParallelSampler(scheduler, 4, 0.1)
    sampler(rows_of(Mixture(scheduler.alphas_cumprod)), noise(1), 4, advanced=lambda done, *_: moved.append(done))
    assert moved == [1, 4]
