"""TAC: K in closed form, from sums over all samples; the toy; which entries are corrected; pipelines come nearer."""

import dataclasses

import pytest
import torch
from torch import Tensor

import modiff
from modiff import ConfigError
from modiff.methods import TacConfig, quantize
from modiff.methods.tac import factors
from modiff.sampling.corrected import corrected, large
from modiff.sampling.lockstep import Batch, lockstep
from tests.gaussian import MEAN, STEPS, final_moments, prediction, sampler
from tests.helpers import assert_same_bits, relative_error
from tests.methods import small

TINY = {"steps": 6, "samples": 4, "batch": 4, "groups": 3, "pairs": 4}
EVERYWHERE = torch.ones(8, 3, 5, 5, dtype=torch.bool)


def outputs() -> Tensor:
    return torch.randn(2, 8, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "settings", [{}, {"relative": 0.0, "ridge": 0.0}, {"relative": 0.8, "floor": 0.0, "ridge": 2.0}]
)
@pytest.mark.parametrize("everywhere", [True, False])
def test_k_is_the_least_of_its_sum_over_what_is_corrected_and_1_where_the_networks_agree(settings, everywhere):
    config = TacConfig(**settings)
    r, noise = outputs()
    q = 1.1 * r + 0.3 * noise
    mask = EVERYWHERE if everywhere else noise > 0.2
    k = factors(q, r, mask, config, 1)
    assert torch.allclose(factors(r, r, EVERYWHERE, config, 1), torch.ones(3, dtype=torch.float64), atol=1e-12)
    for channel in range(3):
        chosen, floor = mask[:, channel], config.floor * r[:, channel].square().mean().sqrt()
        qs, rs = q[:, channel][chosen], r[:, channel][chosen]
        kept = rs.abs() > floor
        n = int(kept.sum())

        def loss(factor: float, qs: Tensor = qs, rs: Tensor = rs, kept: Tensor = kept, n: int = n) -> float:
            relative = (factor * qs[kept] / rs[kept] - 1).square().sum()
            absolute = (factor * qs - rs).square().sum()
            return float(
                (1 - config.relative) * absolute + config.relative * n * relative + config.ridge * n * (factor - 1) ** 2
            )

        best = float(k[channel])
        assert loss(best) < min(loss(best + 1e-4), loss(best - 1e-4))
    if settings.get("relative") == 0:
        least = (q * r * mask).sum((0, 2, 3)) / (q.square() * mask).sum((0, 2, 3))
        assert torch.allclose(k, least, rtol=1e-12)


def test_noise_draws_k_of_the_relative_error_far_below_that_of_least_squares():
    r, noise = outputs()
    published, quick = (factors(r + 0.3 * noise, r, EVERYWHERE, c, 1) for c in (TacConfig(), TacConfig.quick()))
    assert float(published.max()) < 0.75
    assert 0.85 < float(quick.min()) < float(quick.max()) < 1


def test_a_multiple_is_undone_up_to_the_ridge():
    r, c = outputs()[0], 1.05
    config = TacConfig(floor=0.0)
    s, n = r.square().sum((0, 2, 3)), 200
    a, b = config.relative, config.ridge
    expected = ((1 - a) * c * s + a * n * n * c + b * n) / ((1 - a) * c**2 * s + a * n * n * c**2 + b * n)
    assert torch.allclose(factors(c * r, r, EVERYWHERE, config, 1), expected, rtol=1e-12)
    free = dataclasses.replace(config, ridge=0.0)
    assert torch.allclose(factors(c * r, r, EVERYWHERE, free, 1), torch.full((3,), 1 / c, dtype=torch.float64))


def toy(k: float, mu: float, config: TacConfig, batches: int = 1) -> tuple[object, list[dict[str, Tensor]]]:
    """The table and the figures for the exact prediction of Gaussian data, times 1 + k, plus mu."""
    scheduler = sampler()
    noise = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def exact(step: int, state: Tensor) -> Tensor:
        return prediction(scheduler, int(scheduler.timesteps[step]), state)

    pairs = [Batch(part, exact, lambda i, x: (1 + k) * exact(i, x) + mu) for part in noise.chunk(batches)]
    results = lockstep(scheduler, pairs, config.visit, network=torch.nn.Identity(), progress=False)
    return config.table(scheduler, results, 1), results


def test_the_toy_has_k_1_over_1_05_and_ends_with_the_variance_of_full_precision():
    table, results = toy(0.05, 0.0, TacConfig(ridge=0.0))
    for result in results:
        assert torch.allclose(result["K"], torch.full((2,), 1 / 1.05, dtype=torch.float64), rtol=1e-6)
        assert float(result["b"].abs()) < 1e-9
    one = {name: tuple(row[:1] for row in getattr(table, name)) for name in ("gain", "shift")}
    fixed = corrected(sampler(), dataclasses.replace(table, **one))
    fixed.set_timesteps(STEPS)
    assert final_moments(fixed, 0.0, 0.05, 0.0, 0.0) == (0.299, 0.2232)
    for result in toy(0.0, 0.0, TacConfig())[1]:
        assert torch.equal(result["K"], torch.ones(2, dtype=torch.float64))
        assert float(result["b"]) == 0
    assert MEAN > 0


def test_a_constant_error_is_taken_off_the_state_and_batches_do_not_matter():
    for bias, width in (("state", 1), ("channel", 2)):
        config = TacConfig(bias=bias, relative=0.0)
        (table, whole), (_, divided) = toy(0.1, 0.05, config), toy(0.1, 0.05, config, batches=3)
        assert {len(row) for row in table.shift} == {width}
        assert max(abs(row[0]) for row in table.shift) > 1e-3
        for one, other in zip(whole, divided, strict=True):
            assert torch.allclose(one["K"], other["K"], rtol=1e-9)
            assert torch.allclose(one["b"], other["b"], atol=1e-9)


def test_only_large_entries_are_corrected_if_so_chosen_and_in_each_sample_by_its_own_mean():
    q = torch.tensor([[1.0, -4.0, 1.0, 2.5], [10.0, -40.0, 10.0, 25.0]]).reshape(2, 1, 2, 2)
    expected = torch.tensor([[False, True, False, True]] * 2).reshape(2, 1, 2, 2)
    assert torch.equal(large(q, 1.0), expected)
    table, results = toy(0.05, 0.0, TacConfig(corrects="large", ridge=0.0))
    assert table.threshold == 1.0
    assert torch.allclose(results[0]["K"], torch.full((2,), 1 / 1.05, dtype=torch.float64))
    fixed = corrected(sampler(), table)
    fixed.set_timesteps(STEPS)
    state = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = int(fixed.timesteps[0])
    changed = torch.where(large(state, 1.0), state * torch.tensor(table.gain[0])[:, None, None], state)
    expected = sampler().step(changed, t, state).prev_sample - table.shift[0][0]
    assert relative_error(fixed.step(state, t, state).prev_sample, expected) < 1e-9


@pytest.mark.parametrize("modulated", [False, True])
def test_a_quantized_pipeline_follows_the_trajectory_that_was_learned_on_and_comes_nearer(modulated):
    modulation = modiff.ModulationConfig() if modulated else None
    config = TacConfig(**TINY, weight_bits=3, relative=0.0, ridge=0.0, modulation=modulation)
    pipe, exact = small.build(), small.call(small.build(), steps=6, batch=4)
    report = quantize(pipe, config, progress=False)
    figures = dict(report.steps)
    assert set(figures) == {"K", "b"}
    ours, fixed = small.call(pipe, steps=6, batch=4), pipe.scheduler
    pipe.scheduler = corrected(fixed, None)
    assert relative_error(ours, exact) < relative_error(small.call(pipe, steps=6, batch=4), exact)
    pipe.scheduler = fixed
    modiff.remove(pipe)
    assert_same_bits(small.call(pipe, steps=6, batch=4), exact)


def test_settings_that_mean_nothing_are_refused():
    for name, value in (("relative", 1.5), ("floor", -0.1), ("ridge", -1.0), ("threshold", -1.0), ("corrects", "some")):
        with pytest.raises(ConfigError, match=rf"TacConfig\.{name}: expected .*, got {value!r}"):
            TacConfig(**{name: value})
