"""Corrected samplers: the toy with known answers, the plain sampler's bits, what is saved, and what is refused."""

import copy
import pickle
import subprocess
import sys
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from torch import Tensor

from modiff import ConfigError
from modiff.hosts.diffusers.quantizer import align
from modiff.sampling.corrected import Correction, corrected
from tests.gaussian import STEPS, final_moments, sampler
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS, flow, make_scheduler
from tests.methods import small

KINDS = {
    "ddim": (make_scheduler, "ddim", {}),
    "ddim, eta 1": (make_scheduler, "ddim", {"eta": 1.0}),
    "ddpm": (make_scheduler, "ddpm", {}),
    "dpm++2m": (make_scheduler, "dpm++2m", {}),
    "sde-dpm++": (make_scheduler, "sde-dpm++", {}),
    "dpm++2s": (lambda _: diffusers.DPMSolverSinglestepScheduler(), "", {}),
    "cogvideox ddim": (lambda _: diffusers.CogVideoXDDIMScheduler(), "", {}),
    "flow": (lambda _: flow(), "", {}),
}
NOISY = ("ddim, eta 1", "ddpm", "sde-dpm++")


def toy_correction(eta: float, k: float, mu: float, sq: float, *, released: bool = False) -> Correction:
    """PTQD's tables, from the equations: e = (output - mu) / (1 + k), sigma'² = sigma² - lam² sq² / (1 + k)²."""
    scheduler, factors = sampler(), []
    for t in scheduler.timesteps.tolist():
        ab, last = float(scheduler.alphas_cumprod[t]), t - 1000 // STEPS
        ab_s = float(scheduler.alphas_cumprod[last]) if last >= 0 else 1.0
        sigma2 = eta**2 * (1 - ab_s) / (1 - ab) * (1 - ab / ab_s)
        lam = (1 - ab_s - sigma2) ** 0.5 - (ab_s * (1 - ab) / ab) ** 0.5
        absorbed = max(0.0, sigma2 - (lam * sq / (1 + k)) ** 2)
        factors.append((absorbed / sigma2) ** 0.5 if sigma2 else 1.0)
    one = torch.ones(STEPS, 1, dtype=torch.float64)
    noise = {"noise": torch.tensor(factors, dtype=torch.float64), "eta": eta} if eta else {}
    return Correction.of(
        scheduler.timesteps, gain=one / (1 + k), offset=-mu * one / (1 + k), released_direction=released, **noise
    )


@pytest.mark.parametrize(
    ("eta", "error", "exact", "uncorrected", "kept", "released"),
    [
        (0, (0.05, 0, 0), (0.299, 0.2232), (0.299, 0.1222), (0.299, 0.2232), (0.299, 0.2232)),
        (0, (0, 0.05, 0), (0.299, 0.2232), (0.141, 0.2232), (0.299, 0.2232), (0.299, 0.2232)),
        (0, (0, 0, 0.1), (0.299, 0.2232), (0.299, 0.2254), (0.299, 0.2254), (0.299, 0.2254)),
        (1, (0.05, 0.05, 0.1), (0.300, 0.1972), (0.232, 0.1770), (0.300, 0.1972), (0.300, 0.1991)),
        (1, (0, 0, 0.1), (0.300, 0.1972), (0.300, 0.1981), (0.300, 0.1972), (0.300, 0.1992)),
    ],
)
def test_the_toy_ends_with_the_known_mean_and_variance(eta, error, exact, uncorrected, kept, released):
    results = [final_moments(sampler(), eta, 0, 0, 0), final_moments(sampler(), eta, *error)]
    for fault in (False, True):
        fixed = corrected(sampler(), toy_correction(eta, *error, released=fault))
        fixed.set_timesteps(STEPS)
        results.append(final_moments(fixed, eta, *error))
    assert results == [exact, uncorrected, kept, released]


def network(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(x.flip(-1) * 0.7) * (0.5 + float(t) / 2000)


def sampled(scheduler: Any, dtype: torch.dtype = torch.float32, **words: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 4, generator=generator).to(dtype)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator, **words).prev_sample
    return x


def tables(scheduler: Any, name: str, value: float | None = None, **more: Any) -> Correction:
    """Tables that change nothing, or that are `value` wherever they could."""
    scheduler.set_timesteps(6)
    one = torch.ones(6, 3)
    if name in NOISY:
        more = {"noise": torch.ones(6) if value is None else torch.full((6,), value)} | more
    if name == "ddim, eta 1":
        more["eta"] = 1.0
    g, c = (1.0, 0.0) if value is None else (value, value)
    return Correction.of(scheduler.timesteps, gain=g * one, offset=c * one, shift=c * one[:, :1], **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_tables_that_change_nothing_give_the_bits_of_the_plain_sampler(name, dtype, tmp_path):
    make, kind, words = KINDS[name]
    plain = make(kind)
    expected = sampled(plain, dtype, **words)
    fixed = corrected(plain, tables(plain, name))
    assert_same_bits(sampled(fixed, dtype, **words), expected)
    assert_same_bits(sampled(corrected(corrected(fixed, tables(plain, name, 0.9)), None), dtype, **words), expected)
    assert type(corrected(fixed, None)) is type(plain)
    fixed = corrected(fixed, tables(plain, name, 0.9))
    expected = sampled(fixed, dtype, **words)
    fixed.save_pretrained(tmp_path)
    for again in (type(fixed).from_pretrained(tmp_path), type(plain).from_pretrained(tmp_path), copy.deepcopy(fixed),
                  pickle.loads(pickle.dumps(fixed)), type(plain).from_config(fixed.config)):  # fmt: skip
        assert_same_bits(sampled(again, dtype, **words), expected)


@pytest.mark.parametrize("imports", ["import modiff, diffusers", "from diffusers import DDIMScheduler; import modiff"])
def test_a_fresh_interpreter_keeps_or_refuses_the_table_of_a_scheduler_alone(imports, tmp_path):
    plain = make_scheduler("ddim")
    corrected(plain, tables(plain, "ddim", 0.9)).save_pretrained(tmp_path)
    probe = f"""{imports}, sys
import diffusers
assert "modiff.sampling.corrected" not in sys.modules
assert diffusers.DDIMScheduler.from_pretrained({str(tmp_path)!r}).correction.gain[5] == ({float(torch.tensor(0.9))},)*3
diffusers.EulerDiscreteScheduler.from_pretrained({str(tmp_path)!r})"""
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert "ConfigError: correction: expected one of DDIMScheduler, " in result.stderr


def test_steps_of_equal_timesteps_have_rows_of_their_own():
    """Sigmas that lie close together are the same whole timestep."""
    plain = diffusers.DPMSolverMultistepScheduler(use_exponential_sigmas=True)
    plain.set_timesteps(50)
    assert len(set(plain.timesteps.tolist())) < 50
    gain = torch.linspace(0.5, 1.5, 50)
    fixed = corrected(plain, Correction.of(plain.timesteps, gain=gain[:, None]))
    fixed.set_timesteps(50)
    x = y = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for row, t in zip(gain, plain.timesteps, strict=True):
        x = plain.step(network(x, t) * row, t, x).prev_sample
        y = fixed.step(network(y, t), t, y).prev_sample
    assert_same_bits(y, x)


@pytest.mark.parametrize("name", NOISY)
def test_the_noise_is_scaled_and_the_mean_stays(name):
    make, kind, words = KINDS[name]
    plain, steps = make(kind), []
    for factor in (1.0, 0.0, 0.25):
        one = tables(plain, name, noise=torch.full((6,), factor))
        scheduler = corrected(plain, one)
        scheduler.set_timesteps(6)
        x = torch.ones(2, 3, 4, 4)
        noise = torch.Generator().manual_seed(3)
        steps.append(scheduler.step(x * 0.3, scheduler.timesteps[0], x, generator=noise, **words).prev_sample)
    assert (steps[0] - steps[1]).std() > 0.05
    torch.testing.assert_close(steps[2] - steps[1], 0.25 * (steps[0] - steps[1]), rtol=0, atol=1e-6)


def test_output_and_next_state_are_moved_by_channel_also_of_packed_tokens_and_next_to_a_learned_variance():
    scheduler = make_scheduler("ddim", "epsilon")
    scheduler.set_timesteps(2)
    g, c, b = torch.tensor([[2.0, 3.0]] * 2), torch.tensor([[0.5, -0.5]] * 2), torch.tensor([[0.25, 1.0]] * 2)
    x, e = torch.randn(2, 1, 2, 5, generator=torch.Generator().manual_seed(0))
    t = scheduler.timesteps[0]
    wide = [v.reshape(1, 2, 1) for v in (g[0], c[0], b[0])]
    expected = scheduler.step(e * wide[0] + wide[1], t, x).prev_sample - wide[2]
    for dim in (1, -1):
        fixed = corrected(scheduler, Correction.of(scheduler.timesteps, gain=g, offset=c, shift=b, channel_dim=dim))
        fixed.set_timesteps(2)
        turned = [v.movedim(1, dim) for v in (e, x, expected)]
        torch.testing.assert_close(fixed.step(turned[0], t, turned[1], return_dict=False)[0], turned[2])
    learned = type(make_scheduler("dpm++2m")).from_config(scheduler.config, variance_type="learned_range")
    learned.set_timesteps(2)
    fixed = corrected(learned, Correction.of(learned.timesteps, gain=torch.tensor([[2.0, 3.0, 4.0]] * 2)))
    fixed.set_timesteps(2)
    x, e, variance = torch.randn(3, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    outputs = [torch.cat([v, variance], 1) for v in (e, e * torch.tensor([2.0, 3.0, 4.0])[:, None])]
    plain, ours = (
        s.step(o, learned.timesteps[0], x).prev_sample for s, o in zip((fixed, learned), outputs, strict=True)
    )
    assert_same_bits(ours, plain)


def test_corrections_compose_and_the_conditional_mean_of_d2_dpm_is_one():
    steps = [10.0, 5.0]
    g, c, b = torch.tensor([[2.0], [3.0]]), torch.tensor([[0.5, 1.0], [0.0, -1.0]]), torch.tensor([[1.0], [2.0]])
    first = Correction.of(steps, gain=g, offset=c, noise=torch.tensor([0.5, 1.0]), eta=1.0)
    both = first.then(Correction.of(steps, gain=g, shift=b)).then(
        Correction.of(steps, offset=c, noise=torch.ones(2) / 2)
    )
    assert both.gain == ((4.0,), (9.0,))
    assert both.offset == ((1.5, 3.0), (0.0, -4.0))
    assert (both.shift, both.noise, both.eta) == (((1.0,), (2.0,)), (0.25, 0.5), 1.0)
    for name, other in (("timesteps", Correction.of([10.0, 4.0])), ("eta", Correction.of(steps, eta=0.5)),
                        ("threshold", Correction.of(steps, threshold=1.0))):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"then\.{name}: expected"):
            first.then(other)
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(100_000, generator=generator, dtype=torch.float64)
    said = 1.1 * exact + 0.2 + 0.1 * torch.randn(100_000, generator=generator, dtype=torch.float64)
    error = said - exact
    slope = float(torch.corrcoef(torch.stack([said, error]))[0, 1] * error.std() / said.std())
    offset = slope * said.mean() - error.mean()
    table = Correction.of([0.0], gain=torch.full((1, 1), 1 - slope, dtype=torch.float64), offset=offset.reshape(1, 1))
    (gain,), (offset,) = table.gain[0], table.offset[0]
    remaining = gain * said + offset - exact
    assert abs(float(remaining.mean())) < 1e-9
    assert float(remaining.std() / error.std()) == pytest.approx(0.1 / (0.1**2 + 0.1**2) ** 0.5 / 1.1, rel=0.02)


def test_a_pipeline_keeps_its_correction_through_diffusers_own_saving_and_loading(tmp_path):
    pipe = small.build()
    plain = small.call(pipe, steps=6)
    pipe.scheduler.set_timesteps(6)
    pipe.scheduler = corrected(pipe.scheduler, Correction.of(pipe.scheduler.timesteps, gain=torch.full((6, 3), 0.9)))
    expected = small.call(pipe, steps=6)
    assert not torch.equal(expected, plain)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)  # DDIMPipeline makes a DDIMScheduler of any scheduler's config
    assert again.scheduler.correction == pipe.scheduler.correction
    align(again.unet)
    assert_same_bits(small.call(again, steps=6), expected)
    assert_same_bits(small.call(DDIMPipeline(unet=pipe.unet, scheduler=pipe.scheduler), steps=6), expected)
    again.scheduler = corrected(again.scheduler, None)
    assert_same_bits(small.call(again, steps=6), plain)


def test_flow_pipelines_are_corrected_too():
    host = HOSTS["sd3"]
    pipe, plain = host.build(), host.call(host.build())
    pipe.scheduler.set_timesteps(4)
    steps = pipe.scheduler.timesteps
    pipe.scheduler = corrected(pipe.scheduler, Correction.of(steps, gain=torch.ones(4, 4)))
    assert_same_bits(host.call(pipe), plain)
    pipe.scheduler = corrected(pipe.scheduler, Correction.of(steps, gain=torch.full((4, 4), 1.1)))
    assert not torch.equal(host.call(pipe), plain)


def test_what_cannot_be_corrected_is_refused_in_one_line():
    reasons = {"HeunDiscreteScheduler": "Tables are", "UniPCMultistepScheduler": "Tables are",
               "DDIMParallelScheduler": ".* batch_step_no_noise", "DDIMInverseScheduler": ".* to noise"}  # fmt: skip
    for kind, why in reasons.items():
        with pytest.raises(ConfigError, match=rf"correction: expected one of DDIMScheduler, .*, got {kind}\. {why}"):
            corrected(getattr(diffusers, kind)(), Correction.of([1.0]))
    ddim = make_scheduler("ddim")
    fixed = corrected(ddim, tables(ddim, "ddim, eta 1"))
    with pytest.raises(ConfigError, match="got EulerDiscreteScheduler"):
        diffusers.EulerDiscreteScheduler.from_config(fixed.config)
    with pytest.raises(ConfigError, match=r"correction: expected 6 steps, from 831 to 1, got 3\. The table is for"):
        fixed.set_timesteps(3)
    fixed.set_timesteps(6)
    x = torch.ones(1, 3, 2, 2)
    with pytest.raises(ConfigError, match=r"step\.eta: expected 1\.0, which the correction was made for, got 0\.0"):
        fixed.step(x, fixed.timesteps[0], x)
    with pytest.raises(ConfigError, match=r"expected one of 6 timesteps, 831 to 1, got 500"):
        fixed.step(x, 500, x, eta=1.0)
    for name in ("dpm++2m", "dpm++2s", "cogvideox ddim", "flow"):
        make, kind, _ = KINDS[name]
        with pytest.raises(ConfigError, match="expected a correction without `noise`, got one with it"):
            corrected(make(kind), tables(make(kind), name, noise=torch.ones(6)))
    with pytest.raises(ConfigError, match=r"correction\.eta: expected that of `noise`, got None"):
        corrected(ddim, tables(ddim, "ddim", noise=torch.ones(6)))
    wide = corrected(ddim, Correction.of([500.0], gain=torch.ones(1, 3)))
    with pytest.raises(ConfigError, match=r"correction\.gain: expected 1 or 1 numbers a step, got 3"):
        wide.step(x[:, :1], 500, x[:, :1])
    for table in (
        {"threshold": -1.0},
        {"eta": -0.5},
        {"gain": torch.ones(2, 1)},
        {"noise": torch.tensor([-1.0])},
        {"shift": torch.tensor([[float("nan")]])},
    ):
        with pytest.raises(ConfigError, match=rf"Correction\.{next(iter(table))}: expected"):
            Correction.of([1.0], **table)
