"""Samplers of time steps: exact counts, the density they promise, and the ends that clamp."""

import pytest
import torch

from modiff import ConfigError, NormalSteps, UniformGroups


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("groups", "steps"), [(1, 1), (3, 10), (20, 100), (20, 50), (7, 7), (25, 50)])
def test_uniform_groups_keep_equally_spaced_steps_of_every_sample(groups, steps):
    kept = UniformGroups(groups=groups).draw(steps, 4, generator())
    chosen = [i * steps // groups for i in range(groups)]
    assert kept.all(1).nonzero().flatten().tolist() == kept.any(1).nonzero().flatten().tolist() == chosen
    assert kept.shape == (steps, 4)


@pytest.mark.parametrize(("steps", "mean"), [(50, 0.4), (100, 0.5), (400, 0.25)])
def test_the_histogram_of_normal_steps_is_that_of_the_clamped_normal_density(steps, mean):
    samples = 20_000
    kept, again, other = (NormalSteps(mean=mean).draw(steps, samples, generator(seed)) for seed in (1, 1, 2))
    assert kept.sum(0).tolist() == [1] * samples, "exactly one step for each sample"
    assert torch.equal(kept, again)
    assert not torch.equal(kept, other)
    inner = torch.special.ndtr((torch.arange(1, steps).double() - mean * steps) / (steps / 2))
    edges = torch.cat([torch.zeros(1), inner, torch.ones(1)])  # below 1 clamps to 0, from T - 1 on to T - 1
    expected, observed = samples * edges.diff(), kept.sum(1).flip(0).double()
    assert expected.min() > 5
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((steps - 1) / 2).double(), statistic / 2) > 0.001


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormalSteps(mean=-0.1), r"NormalSteps\.mean: expected a share of the steps in \[0, 1\], got -0\.1"),
        (lambda: UniformGroups().draw(10, 1, generator()), r"groups: expected at most 10 groups of 10 steps, got 20"),
        (lambda: UniformGroups(groups=0), r"UniformGroups\.groups: expected 1 or more groups, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
