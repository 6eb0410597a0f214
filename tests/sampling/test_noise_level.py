"""Schedules that follow an estimated noise level: their betas, a toy with a known answer, pipelines, bad input."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import modiff
from modiff.errors import ConfigError
from modiff.hosts.diffusers.runs import noise_generators
from modiff.sampling.corrected import Correction, corrected
from modiff.sampling.noise_level import (
    LearnedSchedulePipeline,
    NoiseLevelEstimator,
    remaining_betas,
    sample_adjusted,
)


@given(level=st.floats(1e-5, 0.9999), steps=st.integers(1, 1000), shape=st.sampled_from(["linear", "fibonacci"]))
def test_betas_have_the_product_that_was_asked_for_and_grow(level: float, steps: int, shape: Any) -> None:
    betas = remaining_betas(level, steps, shape)
    assert len(betas) == steps
    assert float((1 - betas).log().sum().exp()) == pytest.approx(level, rel=1e-9)
    assert (betas > 0).all()
    assert (betas < 1).all()
    assert (betas.diff() >= -1e-15).all()


def test_linear_betas_lie_on_a_line_and_fibonacci_betas_are_sums_of_the_two_before() -> None:
    line = remaining_betas(0.1, 8)
    assert float(line[0]) == 1e-4
    torch.testing.assert_close(line.diff().diff(), torch.zeros(6, dtype=torch.float64), atol=1e-15, rtol=0)
    spiral = remaining_betas(0.1, 8, "fibonacci")
    torch.testing.assert_close(spiral[2:], spiral[1:-1] + spiral[:-2])
    assert remaining_betas(0.9999, 3).tolist() == pytest.approx([1 - 0.9999 ** (1 / 3)] * 3)  # above what b_0 leaves


@pytest.mark.parametrize(
    ("level", "steps", "first_order", "exact"),
    [(1e-2, 10, 0.92, 0.665), (1e-2, 6, 1.54, 0.871), (4e-5, 20, 1.01, 0.715)],
)
def test_the_first_order_formula_fails_for_few_steps_where_bisection_is_exact(
    level: float, steps: int, first_order: float, exact: float
) -> None:
    rough = remaining_betas(level, steps, solver="first_order")
    assert float(rough[-1]) == pytest.approx(first_order, abs=0.01)
    assert float(remaining_betas(level, steps)[-1]) == pytest.approx(exact, abs=0.001)
    if steps == 10:
        assert float((1 - rough).prod()) == pytest.approx(2.2e-4, rel=0.05)
    many = remaining_betas(0.99, 1000, solver="first_order")  # where betas are small it is as good
    torch.testing.assert_close(many, remaining_betas(0.99, 1000), rtol=1e-3, atol=1e-8)


def toy(steps: int, kind: Any = DDPMScheduler, **options: Any) -> tuple[Tensor, list[float]]:
    """A million values of data N(0, 1/4), from ab_N = 1e-3 down, by exact noise and the best estimator of the level."""
    scheduler = kind(clip_sample=False, trained_betas=remaining_betas(1e-3, 1000).tolist())
    table = scheduler.alphas_cumprod.double().numpy()

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        ab = 1 / (1 + np.exp(-np.interp(float(timestep), np.arange(1000), np.log(table / (1 - table)))))
        return (1 - ab) ** 0.5 / (ab / 4 + 1 - ab) * x

    def levels_of(x: Tensor) -> Tensor:
        return ((1 - x.square().mean()) / 0.75).clamp(1e-6, 1 - 1e-6)

    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 1000, dtype=torch.float64, generator=noise)
    return sample_adjusted(x, predict, levels_of, scheduler, range(steps), generator=noise, **options)


@pytest.mark.parametrize(
    ("steps", "fixed", "adjusted"), [(3, 0.040, 0.084), (6, 0.091, 0.226), (10, 0.123, 0.241), (20, 0.164, 0.247)]
)
def test_an_adjusted_schedule_ends_near_the_variance_of_the_data_and_a_fixed_one_below(
    steps: int, fixed: float, adjusted: float
) -> None:
    # a variance of a million values of size .25 has a deviation of .00035, the level one of .002
    assert float(toy(steps, adjusted_steps=())[0].var()) == pytest.approx(fixed, abs=0.002)
    assert float(toy(steps)[0].var()) == pytest.approx(adjusted, abs=0.004)


def test_the_levels_are_those_before_each_step_and_unadjusted_ones_follow_the_betas() -> None:
    betas = remaining_betas(1e-3, 6)
    expected = (1 - betas).cumprod(0).flip(0).tolist()
    assert toy(6, adjusted_steps=())[1] == pytest.approx(expected, rel=1e-4)  # the table is in float32
    once = toy(6, adjusted_steps={2})[1]
    assert once[:3] == pytest.approx(expected[:3], rel=1e-4)
    assert once[3:] == pytest.approx((1 - remaining_betas(once[3], 3)).cumprod(0).flip(0).tolist())
    assert once[3] > expected[3] + 0.05  # the coarse steps leave less noise than the schedule says


@pytest.mark.parametrize("levels", [(0.2, 0.7), (1 - 1e-8,) * 2], ids=["two levels", "clean: 1 in float32"])
def test_the_level_of_a_batch_is_the_mean_of_its_samples(levels: tuple[float, ...]) -> None:
    seen = torch.tensor(levels, dtype=torch.float64)
    for scheduler in (DDIMScheduler(), DDPMScheduler()):
        sample, read = sample_adjusted(torch.ones(2, 1), lambda x, _: 0 * x, lambda _: seen, scheduler, range(3))
        assert read[1:] == pytest.approx([float(seen.mean())] * 2)
        assert sample.isfinite().all()


@pytest.mark.parametrize("shape", ["linear", "fibonacci"])
@pytest.mark.parametrize("steps", [1, 2, 60])
def test_any_number_of_steps_ends_in_finite_samples(shape: Any, steps: int) -> None:
    sample, levels = toy(steps, DDIMScheduler, schedule=shape)
    assert torch.isfinite(sample).all()
    assert len(levels) == steps
    assert float(sample.var()) == pytest.approx(0.25, abs=0.01) if steps == 60 else True


def test_the_first_order_solver_with_few_steps_ends_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"expected betas below 1, got 4\.\d+.*solver='bisection'") as caught:
        toy(3, solver="first_order")
    assert "\n" not in str(caught.value)


@pytest.fixture
def pipe() -> LearnedSchedulePipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
                       block_out_channels=(16, 16), down_block_types=("DownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "UpBlock2D"))  # fmt: skip
    made = LearnedSchedulePipeline(unet, DDIMScheduler(), NoiseLevelEstimator(channels=(8, 8)))
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe: LearnedSchedulePipeline, **options: Any) -> Any:
    return pipe(2, noise_generators(0, range(2)), 5, **{"output_type": "np"} | options)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_a_pipeline_is_saved_loaded_and_modulated_and_its_estimator_stays(
    pipe: LearnedSchedulePipeline, kind: Any, tmp_path: Any
) -> None:
    pipe.register_modules(scheduler=kind())
    before = drawn(pipe)
    assert before.images.shape == (2, 8, 8, 1)
    assert len(before.levels) == 5
    pipe.save_pretrained(tmp_path)
    loaded = LearnedSchedulePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    again = drawn(loaded)
    assert again.images == pytest.approx(before.images, abs=1e-5)
    assert again.levels == pytest.approx(before.levels, abs=1e-5)
    kinds = [type(module) for module in loaded.estimator.modules()]
    modiff.apply(loaded, "w8a8")
    assert [type(module) for module in loaded.estimator.modules()] == kinds
    assert 0 < np.abs(drawn(loaded).images - before.images).max() < 0.1
    images, levels = drawn(loaded, return_dict=False)
    assert len(images) == 2
    assert len(levels) == 5


def test_a_network_in_bfloat16_gives_arrays(pipe: LearnedSchedulePipeline) -> None:
    pipe.unet.to(torch.bfloat16)
    assert drawn(pipe).images.dtype == np.float32


def test_an_estimator_says_the_level_whose_logarithm_it_is_trained_on() -> None:
    torch.manual_seed(0)
    estimator, images = NoiseLevelEstimator(3, (4, 4)), torch.randn(5, 3, 9, 12)
    levels = estimator.levels(images)
    assert levels.shape == (5,)
    torch.testing.assert_close((1 - levels).log(), estimator(images).detach())
    assert torch.isfinite(estimator.levels(torch.zeros(1, 3, 8, 8))).all()  # no deviation at all
    for wrong in (torch.zeros(5, 1, 9, 12), torch.zeros(5, 3, 2, 12), torch.zeros(3, 9, 12)):
        with pytest.raises(ConfigError, match=r"NoiseLevelEstimator: expected \(N, 3, H, W\) from 4 pixels, got \("):
            estimator.levels(wrong)


def test_another_scheduler_and_impossible_levels_are_refused(pipe: LearnedSchedulePipeline) -> None:
    with pytest.raises(ConfigError, match="expected DDIMScheduler or DDPMScheduler, got 'EulerDiscreteScheduler'"):
        LearnedSchedulePipeline(pipe.unet, EulerDiscreteScheduler(), pipe.estimator)  # type: ignore[arg-type]
    table = Correction(timesteps=(0.0,), gain=((1.0,),))
    with pytest.raises(ConfigError, match=r"expected a scheduler without a correction.*corrected\(scheduler, None\)"):
        LearnedSchedulePipeline(pipe.unet, corrected(pipe.scheduler, table), pipe.estimator)
    with pytest.raises(ConfigError, match=r"estimator: expected a NoiseLevelEstimator, got 'Linear'.*from_pretrained"):
        LearnedSchedulePipeline(pipe.unet, pipe.scheduler, nn.Linear(2, 2))  # type: ignore[arg-type]
    for options, message in (
        ({"adjusted_steps": [0, 5]}, r"adjusted_steps: expected steps from 0 to 4, got \[0, 5\]"),
        ({"eta": 1.5}, r"eta: expected 0 to 1, got 1.5"),
        ({"output_type": "latent"}, "LearnedSchedulePipeline.output_type: expected pil, np or pt"),
    ):
        with pytest.raises(ConfigError, match=message):
            drawn(pipe, **options)
    pipe.register_modules(scheduler=DDIMScheduler(rescale_betas_zero_snr=True))
    for level, steps, options, message in (
        (0.0, 5, {}, "level: expected more than 0 and less than 1, got 0"),
        (0.5, 0, {}, "steps: expected 1 or more, got 0"),
        (0.5, 2.5, {}, "steps: expected a whole number, got 2.5"),
        (0.5, 5, {"shape": "cosine"}, "schedule: expected linear or fibonacci, got 'cosine'"),
        (0.5, 5, {"solver": "newton"}, "solver: expected bisection or first_order, got 'newton'"),
    ):
        with pytest.raises(ConfigError, match=message):
            remaining_betas(level, steps, **options)  # type: ignore[arg-type]
