"""Samplers of time steps: exact counts, the density they promise, and the ends that clamp."""

from __future__ import annotations

import pytest
import torch

from modiff import ConfigError, NormalSteps, UniformGroups


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("groups", "steps"), [(1, 1), (3, 10), (20, 100), (20, 50), (7, 7), (25, 50)])
def test_uniform_groups_keep_equally_spaced_steps_of_every_sample(groups, steps):
    kept = UniformGroups(groups=groups).draw(steps, 4, generator())
    assert kept.shape == (steps, 4)
    assert kept.sum().item() == groups * 4
    chosen = [s for s in range(steps) if kept[s].all()]
    assert len(chosen) == groups
    assert chosen[0] == 0
    gaps = {b - a for a, b in zip(chosen, [*chosen[1:], steps], strict=True)}
    assert gaps <= {steps // groups, steps // groups + 1}
    if steps % groups == 0:
        assert gaps == {steps // groups}


def test_more_groups_than_steps_are_refused():
    with pytest.raises(ConfigError, match=r"UniformGroups\.groups: expected at most 10 groups of 10 steps, got 20"):
        UniformGroups().draw(10, 1, generator())


def below(value: float, mean: float, deviation: float) -> float:
    """P(x < value) for a normal x."""
    return float(torch.special.ndtr(torch.tensor((value - mean) / deviation, dtype=torch.float64)))


def chi_square(observed: list[float], expected: list[float]) -> float:
    """The chance of counts at least as far from what is expected."""
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def times_of(kept: torch.Tensor) -> torch.Tensor:
    """The time of each sample, counted from the clean end."""
    assert kept.sum(0).tolist() == [1] * kept.shape[1], "exactly one step for each sample"
    return len(kept) - 1 - kept.int().argmax(0)


@pytest.mark.parametrize(("steps", "mean"), [(50, 0.4), (100, 0.5), (400, 0.25)])
def test_the_histogram_of_normal_steps_is_that_of_the_clamped_normal_density(steps, mean):
    samples = 20_000
    times = times_of(NormalSteps(mean=mean).draw(steps, samples, generator(1)))
    inner = [below(t, mean * steps, steps / 2) for t in range(1, steps)]
    edges = torch.tensor([0.0, *inner, 1.0], dtype=torch.float64)  # below 1 clamps to 0, from T - 1 on to T - 1
    expected = samples * edges.diff()
    observed = torch.bincount(times, minlength=steps).double()
    rare = expected < 5  # the tails count as one
    counts = [*observed[~rare].tolist(), float(observed[rare].sum())]
    assert chi_square(counts, [*expected[~rare].tolist(), max(float(expected[rare].sum()), 1e-9)]) > 0.001


def test_a_seed_repeats_the_draw_and_another_does_not():
    draws = [NormalSteps().draw(50, 64, generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormalSteps(mean=-0.1), r"NormalSteps\.mean: expected a share of the steps in \[0, 1\], got -0\.1"),
        (lambda: NormalSteps(mean=1.1), r"NormalSteps\.mean: .* got 1\.1"),
        (lambda: UniformGroups(groups=0), r"UniformGroups\.groups: expected 1 or more groups, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
