"""Decoupled diffusion: its steps are the published ones and members of DDIM, and pipelines keep the scheduler."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, EulerDiscreteScheduler, UNet2DModel
from torch import Tensor

import modiff
from modiff.assets import ddm_folder, embedded_folder
from modiff.errors import ConfigError
from modiff.generate.samplers import UnconditionalPipeline, set_scheduler
from modiff.hosts.diffusers.runs import noise_generators
from modiff.sampling.ddm import OUTPUTS, DDMScheduler
from tests.reference.decoupled import ddim, mixture_noise, published

ATTENUATIONS = tuple(OUTPUTS["decomposition"])


def scheduler(attenuation: str = "constant", steps: int = 10, **options: Any) -> DDMScheduler:
    made = DDMScheduler(attenuation=attenuation, **{"prediction_type": "decomposition"} | options)
    made.set_timesteps(steps)
    return made


def output_of(made: DDMScheduler, x: Tensor, time: Tensor, slope: Tensor, eps: Tensor, curve: Tensor) -> Tensor:
    """What a network must return for this C, eps and K, by the definition of v."""
    a, s = made.levels(time)
    n = (a**2 + s**2).sqrt()
    v = (a * x / n + n * (slope + curve / 2)) / s
    return torch.cat([curve, v, eps] if made.outputs == 3 else [v, eps], 1)


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
@pytest.mark.parametrize("index", [0, 4, 8])
def test_a_step_is_the_published_one(attenuation: str, index: int) -> None:
    made = scheduler(attenuation, clip_sample=False)
    time, until = made.times[index : index + 2]
    shape, linear = (2, 1, 3, 3), attenuation == "linear"
    image, eps = torch.randn(2, *shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
    curve = image.flip(3).clamp(-1, 1) if linear else torch.zeros_like(image)
    slope = -image - curve / 2
    x = made.add_noise(image, eps, time, curve)
    mean, variance = published(attenuation, x, float(time), float(time - until), slope, eps, curve)
    output = output_of(made, x, time, slope, eps, curve)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    after = made.step(output, made.timesteps[index], x, torch.Generator().manual_seed(7)).prev_sample
    torch.testing.assert_close(after, mean + variance**0.5 * noise, rtol=0, atol=1e-12)


def test_the_noise_of_a_step_is_that_of_the_forward_process() -> None:
    """Brownian motion W at u and t: W_u given W_t has mean u / t W_t and variance u (t - u) / t."""
    t, u = 0.7, 0.45
    steps = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    early = u**0.5 * steps[0]
    late = early + (t - u) ** 0.5 * steps[1]
    mean, variance = published("constant", late, t, t - u, torch.zeros(()), late / t**0.5, torch.zeros(()))
    assert float((early - mean).mean()) == pytest.approx(0, abs=0.003)
    assert float((early - mean).var()) == pytest.approx(variance, rel=0.01)
    assert float(((early - mean) * late).mean()) == pytest.approx(0, abs=0.003)


@pytest.mark.parametrize("attenuation", ["constant", "const_2"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("last_time", [0.0, 1e-4])
def test_a_noise_model_sampled_as_a_ddm_is_the_ddim_member_of_that_schedule(
    attenuation: str, eta: float, last_time: float
) -> None:
    options = {"clip_sample": False, "eta": eta, "last_time": last_time, "prediction_type": "epsilon"}
    made = scheduler(attenuation, 12, **options)
    assert len(made.timesteps) == 12
    ours, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, u, timestep in zip(made.times[:-1], made.times[1:], made.timesteps, strict=True):
        (a, s), (b, r) = made.levels(t), made.levels(u)
        n, m = float((a**2 + s**2).sqrt()), float((b**2 + r**2).sqrt())
        torch.testing.assert_close(made.scale_model_input(x, timestep), x / n, rtol=0, atol=1e-15)
        eps = torch.sin(3 * x / n + float(timestep) / 100)
        sigma = eta * (float(u * (t - u) / t) if attenuation == "constant" else float(r**2 * (1 - r**2 / s**2))) ** 0.5
        after = made.step(eps, timestep, x, ours).prev_sample
        z = torch.randn(x.shape, generator=noise, dtype=x.dtype) if sigma > 0 else torch.zeros_like(x)
        expected = m * ddim(x / n, eps, (float(a / n), float(s / n)), (float(b / m), float(r / m)), sigma / m, z)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-12)
        x = after


def test_the_image_is_kept_within_its_range_and_the_noise_is_not_changed_by_that() -> None:
    made = scheduler(eta=0.0, clip_sample_range=0.5)
    image, eps = torch.tensor([[[[-2.0, -0.2], [0.3, 3.0]]], [[[0.4, -1.0], [2.0, 0.1]]]], dtype=torch.float64).chunk(2)
    time, until = made.times[3:5]
    x = made.add_noise(image, eps, time)
    after = made.step(output_of(made, x, time, -image, eps, 0 * eps), made.timesteps[3], x).prev_sample
    torch.testing.assert_close(after, (1 - until) * image.clamp(-0.5, 0.5) + until.sqrt() * eps)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_what_else_a_model_predicts_says_the_same(prediction_type: str) -> None:
    made, other = (scheduler(prediction_type=p, eta=0.0) for p in ("epsilon", prediction_type))
    image, eps = torch.rand(2, 1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, s = made.levels(made.times[3])
    x, n = a * image + s * eps, (a**2 + s**2).sqrt()
    output = image if prediction_type == "sample" else (a * eps - s * image) / n
    torch.testing.assert_close(
        other.step(output, made.timesteps[3], x).prev_sample, made.step(eps, made.timesteps[3], x).prev_sample
    )


def test_the_network_is_told_the_row_of_the_table_with_that_noise_and_more_beyond_its_last() -> None:
    made, table = scheduler(), DDIMScheduler().alphas_cumprod.double()
    rows = torch.tensor([0, 1, 10, 500, 998, 999])
    ratio = (table / (1 - table))[rows]
    time = torch.tensor([((r / 4 + 1).sqrt() - r.sqrt() / 2) ** 2 for r in ratio])  # (1 - t)^2 / t = r
    torch.testing.assert_close(made.timestep(time), rows.double(), rtol=1e-6, atol=1e-6)
    assert made.timestep(torch.tensor([0.9936, 0.995, 1.0])).diff().min() > 0
    made.set_timesteps(5)
    assert made.times.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 1e-4, 0])
    assert float(made.timesteps[0]) == 1000
    made.set_timesteps(1)
    assert made.times.tolist() == [1, 0]
    whole = scheduler(prediction_type="epsilon", last_time=0.0, steps=4)
    assert whole.times.tolist() == pytest.approx([whole.start * share for share in (1, 0.75, 0.5, 0.25, 0)])
    assert float(whole.timesteps[0]) == pytest.approx(999)


def test_with_exact_outputs_a_mixture_comes_out_the_nearer_the_more_steps() -> None:
    means, weights = torch.tensor([-0.8, 0.1, 0.7]).double(), torch.tensor([0.3, 0.5, 0.2]).double()
    count = 20_000
    picked = torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(1))
    data = means[picked] + 0.1 * torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    errors: dict[float, list[float]] = {}
    for eta in (0.0, 1.0):
        for steps in (5, 10, 20, 50):
            made = scheduler(steps=steps, eta=eta, clip_sample=False)
            noise = torch.Generator().manual_seed(0)
            x = torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=noise)
            for t, timestep in zip(made.times, made.timesteps, strict=False):
                a, s = made.levels(t)
                eps = mixture_noise(x, a, s, means, weights, 0.1)
                # at t = 1 nothing of the image is left: the mean of the data
                image = (x - s * eps) / a if a > 0 else (weights @ means).expand_as(x)
                x = made.step(output_of(made, x, t, -image, eps, torch.zeros_like(x)), timestep, x, noise).prev_sample
            gap = x.flatten().sort().values - data.sort().values
            errors.setdefault(eta, []).append(float(gap.abs().mean()))
    for falling in errors.values():
        assert falling == sorted(falling, reverse=True)
        assert falling[-1] < 0.05
    assert errors[1.0] == pytest.approx(errors[0.0], rel=0.5, abs=0.03)  # the sampler itself brings nothing


def two_outputs(attenuation: str = "constant") -> UnconditionalPipeline:
    torch.manual_seed(0)
    made = scheduler(attenuation)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=made.outputs, layers_per_block=1,
                       block_out_channels=(16, 16), down_block_types=("DownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=8)  # fmt: skip
    pipe = UnconditionalPipeline(unet=unet, scheduler=made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, steps: int = 5) -> np.ndarray:
    generators = noise_generators(0, range(2))
    return pipe(batch_size=2, num_inference_steps=steps, generator=generators, output_type="np").images


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
def test_a_pipeline_is_saved_loaded_and_modulated(attenuation: str, tmp_path: Path) -> None:
    pipe = two_outputs(attenuation)
    plain = images(pipe)
    assert plain.shape == (2, 8, 8, 1)
    assert np.isfinite(plain).all()
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["attenuation"] == attenuation
    loaded = UnconditionalPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, DDMScheduler)
    assert np.array_equal(images(loaded), plain)
    modiff.apply(loaded, "w8a8")
    modulated = images(loaded)
    assert 0 < np.abs(modulated - plain).max() < 0.05
    modiff.pack(loaded)
    modiff.save(loaded, tmp_path / "packed")
    again = modiff.load(tmp_path / "packed")
    assert isinstance(again.scheduler, DDMScheduler)
    assert np.abs(images(again) - images(loaded)).max() < 1e-5


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_scheduler_that_leaves_its_prediction_to_the_default_becomes_a_ddm_of_noise(kind: Any) -> None:
    """diffusers hands on what was set alone: the defaults of both must say the same."""
    made = DDMScheduler.from_config(kind().config)
    assert (made.config.prediction_type, made.outputs) == ("epsilon", 1)
    assert (
        DDMScheduler.from_config(kind(prediction_type="v_prediction").config).config.prediction_type == "v_prediction"
    )


def test_the_embedded_model_draws_as_a_ddm_what_it_draws_with_ddim() -> None:
    pipe = DDIMPipeline.from_pretrained(embedded_folder())
    pipe.set_progress_bar_config(disable=True)
    as_ddm = set_scheduler(pipe, "ddm")
    as_ddm.scheduler = DDMScheduler.from_config(as_ddm.scheduler.config, eta=0.0)
    drawn, expected = images(as_ddm, 20), images(pipe, 20)
    assert np.linalg.norm(drawn - expected) / np.linalg.norm(expected) < 0.5  # as two schedules of one equation are


def test_the_trained_ddm_of_the_package_draws_clothing_on_black_in_few_evaluations() -> None:
    pipe = UnconditionalPipeline.from_pretrained(ddm_folder())
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.scheduler.outputs, pipe.scheduler.config.attenuation) == (2, "constant")
    drawn = images(pipe, 4)
    assert 0.1 < drawn.mean() < 0.6
    assert drawn[:, :2].mean() < 0.05 < drawn[:, 12:20, 12:20].mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "flow"}, "expected one of decomposition, epsilon, v_prediction, sample, got 'flow'"),
        (
            {"attenuation": "cubic", "prediction_type": "decomposition"},
            "expected one of constant, const_2, linear, got 'cubic'",
        ),
        ({"attenuation": "linear"}, "expected one of constant, const_2, got 'linear'.*prediction_type='decomposition'"),
        ({"eta": 1.5}, "expected 0 to 1, got 1.5"),
        ({"last_time": 0.5}, "expected 0 up to 0.1, got 0.5"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: expected False, got True"),
        ({"thresholding": True}, "thresholding: expected False, got True"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        DDMScheduler(**options)
    assert "\n" not in str(caught.value)


def test_no_steps_and_a_model_of_other_outputs_are_refused() -> None:
    made = scheduler()
    for steps, expected in ((0, "1 or more"), (2.5, "a whole number")):
        with pytest.raises(ConfigError, match=f"num_inference_steps: expected {expected}, got {steps}"):
            made.set_timesteps(steps)  # type: ignore[arg-type]
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ConfigError, match=r"expected 2 x 1 channels, got \(1, 1, 4, 4\)"):
        made.step(x, made.timesteps[0], x)
