"""PTQD: k, mu and s come out as they went in, the toy ends where it should, and the noise is that of the formula."""

import dataclasses
import re

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

import modiff
from modiff import ConfigError
from modiff.generate.samplers import set_scheduler
from modiff.methods import PtqdConfig, quantize
from modiff.methods.ptqd import bits_of_steps, noise_factors
from modiff.sampling.corrected import corrected
from modiff.sampling.lockstep import Step
from tests.gaussian import STEPS, final_moments, sampler
from tests.helpers import assert_same_bits, relative_error
from tests.hosts.tiny import HOSTS, make_scheduler
from tests.methods import small

TINY = {"steps": 6, "samples": 4, "batch": 4, "groups": 3, "pairs": 4}


def seen(exact: Tensor, quantized: Tensor, config: PtqdConfig) -> tuple[dict[str, Tensor], Step]:
    step = Step(0, 1, (exact, exact, exact - 1), exact, quantized, lambda output, state: state)
    return config.visit(step), step


def faulty(k: float, mu: Tensor, s: float, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    exact, noise = torch.randn(2, 256, 2, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    exact += mean
    return exact, (1 + k) * exact + mu.reshape(1, -1, 1, 1) + s * noise


def test_slope_means_and_noise_come_out_and_the_network_goes_on_with_full_precision():
    mu = torch.tensor([0.05, -0.02])
    exact, quantized = faulty(0.05, mu, 0.1)
    figures, step = seen(exact, quantized, PtqdConfig())
    assert float(figures["k"]) == pytest.approx(0.05, abs=3 * 0.1 / exact.numel() ** 0.5)
    assert torch.allclose(figures["mu"], mu.double(), atol=3 * 0.1 / (exact.numel() / 2) ** 0.5)
    assert float(figures["s"]) == pytest.approx(0.106, abs=2e-3), "the noise, and channels that lie apart"
    assert float(figures["signal_to_noise"]) == pytest.approx(
        float(exact.square().sum() / (quantized - exact).square().sum())
    )
    assert step.next is step.full_next


def test_the_released_bias_counts_the_slope_twice_and_the_published_slope_is_never_negative():
    mu = torch.tensor([0.05, -0.02])
    exact, quantized = faulty(0.05, mu, 0.0, mean=0.5)
    for bias, extra in (("remainder", 0.0), ("total", 0.05 * 0.5)):
        figures, _ = seen(exact, quantized, PtqdConfig(bias=bias))
        assert torch.allclose(figures["mu"], mu.double() + extra, atol=2e-3)
    exact, quantized = faulty(-0.05, mu, 0.0)
    assert float(seen(exact, quantized, PtqdConfig())[0]["k"]) == 0
    assert float(seen(exact, quantized, PtqdConfig(slope="any"))[0]["k"]) == pytest.approx(-0.05, abs=1e-3)


@pytest.mark.parametrize(
    ("eta", "error", "direction", "final"),
    [
        (0.0, (0.05, 0, 0), "kept", (0.299, 0.2232)),
        (1.0, (0.05, 0.05, 0.1), "kept", (0.300, 0.1972)),
        (1.0, (0.05, 0.05, 0.1), "released", (0.300, 0.1991)),
    ],
)
def test_the_table_ends_the_toy_with_the_known_mean_and_variance(eta, error, direction, final):
    figures = {name: torch.tensor([value]).double() for name, value in zip(("k", "mu", "s"), error, strict=True)}
    table = PtqdConfig(eta=eta, direction=direction).table(sampler(), [figures] * STEPS, 1)
    fixed = corrected(sampler(), table)
    fixed.set_timesteps(STEPS)
    assert final_moments(fixed, eta, *error) == final


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_noise_that_is_left_is_that_of_the_formulas_of_ddim_and_ddpm(kind):
    remaining = torch.full((10, 1), 0.05, dtype=torch.float64)
    for scheduler, eta in ((DDIMScheduler(prediction_type=kind), 0.5), (DDPMScheduler(prediction_type=kind), 0.0)):
        scheduler.set_timesteps(10)
        expected = []
        for t in scheduler.timesteps.tolist():
            ab = float(scheduler.alphas_cumprod[t])
            ab_s = float(scheduler.alphas_cumprod[t - 100]) if t >= 100 else 1.0
            beta = 1 - ab / ab_s
            sigma2 = (1 - ab_s) / (1 - ab) * beta
            clean, noise = {  # what an output of 1 adds to the predicted image and to the predicted noise
                "epsilon": (-(((1 - ab) / ab) ** 0.5), 1.0), "v_prediction": (-((1 - ab) ** 0.5), ab**0.5),
                "sample": (1.0, -((ab / (1 - ab)) ** 0.5)),
            }[kind]  # fmt: skip
            if eta:
                sigma2 *= eta**2
                lam = ab_s**0.5 * clean + (1 - ab_s - sigma2) ** 0.5 * noise
            else:
                lam = ab_s**0.5 * beta / (1 - ab) * clean  # of noise: beta² / (alpha (1 - ab)) in PTQD's formula
            expected.append(max(0.0, 1 - (lam * 0.05) ** 2 / sigma2) ** 0.5 if t else 1.0)
        factors = noise_factors(scheduler, remaining, eta)
        assert factors.tolist() == pytest.approx(expected, abs=1e-4)
        assert min(expected) < 0.999
    for scheduler in (DDIMScheduler(), make_scheduler("dpm++2m"), make_scheduler("sde-dpm++")):
        scheduler.set_timesteps(10)
        assert noise_factors(scheduler, remaining, 0.0) is None


def test_a_step_gets_the_fewest_bits_whose_noise_is_less_than_that_of_its_state():
    scheduler = sampler()
    ratios = {8: [1e6] * STEPS, 4: [1.0] * STEPS, 6: [1e6] * 49 + [0.0]}
    bits = bits_of_steps(scheduler, ratios)
    alphas = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]
    assert bits[:-1] == [4 if alpha < 0.5 else 6 for alpha in alphas[:-1]]
    assert bits[-1] == 8
    assert 4 < bits.count(4) < STEPS - 4
    assert bits_of_steps(scheduler, {4: [0.0] * STEPS, 8: [0.0] * STEPS}) == [8] * STEPS


@pytest.mark.parametrize("modulated", [False, True])
def test_a_pipeline_is_corrected_stays_so_when_it_is_saved_and_comes_off(modulated, tmp_path):
    modulation = modiff.ModulationConfig() if modulated else None
    config = PtqdConfig(**TINY, weight_bits=4, modulation=modulation)
    pipe, exact = small.build(), small.call(small.build(), steps=6, seed=50, batch=4)
    report = quantize(pipe, config, progress=False)
    figures = dict(report.steps)
    assert [len(values) for values in figures.values()] == [6] * 4
    assert report.to_dict()["steps"]["k"] == list(figures["k"])
    assert "k: " in str(report)
    ours = small.call(pipe, steps=6, seed=50, batch=4)
    modiff.save(pipe, tmp_path / "saved")
    again = modiff.load(tmp_path / "saved")
    if not modulated:  # a packed layer anchors with its codes
        assert_same_bits(small.call(again, steps=6, seed=50, batch=4), ours)
    assert again.scheduler.correction == pipe.scheduler.correction
    with pytest.raises(ConfigError, match="expected 6 steps, from"):
        small.call(again, steps=5)
    pipe.scheduler = corrected(fixed := pipe.scheduler, None)
    assert 0 < relative_error(ours, small.call(pipe, steps=6, seed=50, batch=4)) < 0.1
    pipe.scheduler = fixed
    modiff.remove(pipe)
    assert_same_bits(small.call(pipe, steps=6, seed=50, batch=4), exact)


@pytest.mark.parametrize("modulated", [False, True])
def test_steps_that_need_fewer_bits_get_them_also_from_a_folder_and_when_loaded(modulated, tmp_path, monkeypatch):
    chosen = [3, 3, 3, 8, 8, 8]
    monkeypatch.setattr("modiff.methods.ptqd.bits_of_steps", lambda scheduler, ratios: chosen if ratios else [])
    modulation = modiff.ModulationConfig() if modulated else None
    config = PtqdConfig(**TINY, modulation=modulation, step_bits=(3, 8), attention="full_precision")
    pipe = small.build()
    report = quantize(pipe, config, folder=tmp_path / "job", progress=False)
    steps = chosen[int(modulated) :]
    assert dict(report.steps)["bits"] == tuple(map(float, steps))
    quantizer = pipe.unet.conv_in.quantizer
    assert quantizer.config.step_bits == tuple(steps)
    widest: list[int] = []
    scaled = quantizer.scaled
    monkeypatch.setattr(
        quantizer, "scaled", lambda *args: (code := scaled(*args), widest.append(int(code.parts[0][0].abs().max())))[0]
    )
    images = small.call(pipe, steps=6, seed=50, batch=4)
    assert [largest <= 4 for largest in widest] == [bits == 3 for bits in steps]
    again = small.build()
    assert quantize(again, config, folder=tmp_path / "job", progress=False).steps == report.steps
    assert_same_bits(small.call(again, steps=6, seed=50, batch=4), images)
    modiff.save(again, tmp_path / "saved")
    if not modulated:  # a packed layer anchors with its codes
        assert_same_bits(small.call(modiff.load(tmp_path / "saved"), steps=6, seed=50, batch=4), images)


def test_what_cannot_be_corrected_is_refused_with_the_reason():
    wrong = [("pairs", 3), ("eta", 2.0), ("bias", "none"), ("slope", "all"), ("step_bits", (8,)), ("step_bits", (4, 6))]
    for name, value in wrong:
        with pytest.raises(ConfigError, match=rf"PtqdConfig\.{name}: expected .*, got {re.escape(repr(value))}"):
            dataclasses.replace(PtqdConfig(**TINY), **{name: value})
    pipe = set_scheduler(small.build(), "heun")
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ConfigError, match=r"correction: expected one of DDIMScheduler, .*, got HeunDiscreteScheduler"):
        quantize(pipe, PtqdConfig(**TINY), progress=False)
    with pytest.raises(ConfigError, match="PtqdConfig: expected a pipeline, got a module alone"):
        quantize(pipe.unet, PtqdConfig(**TINY), run=lambda i: None, evaluations_per_run=6, progress=False)
    flux = HOSTS["flux"]
    config = PtqdConfig(**TINY | {"steps": 2, "groups": 1, "samples": 1, "batch": 1, "pairs": 1})
    pipe = flux.build()
    with pytest.raises(ConfigError, match="expected one evaluation a step, got guidance in two calls"):
        quantize(pipe, config, run=lambda i: flux.call(pipe, steps=2, seed=i), evaluations_per_run=2, progress=False)
