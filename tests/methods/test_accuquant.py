"""AccuQuant: groups of the sampler's steps, learned scales that are kept only if they arrive closer."""

import dataclasses
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverSinglestepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

import modiff
from accuquant_groups import exact_gradient
from modiff import ConfigError, FormatError
from modiff.calibration.data import Call
from modiff.generate.samplers import set_scheduler
from modiff.methods import AccuquantConfig, quantize
from modiff.methods.accuquant import Group, approximate_gradient
from modiff.methods.sampler_steps import SamplerSteps, as_recorded, save_tables
from modiff.model.calibrate import quantizers_of
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS
from tests.methods import small

QUICK = AccuquantConfig(
    weight_bits=None, activation_bits=4, steps=4, samples=2, batch=2, group_size=2, iterations=4, learning_rate=0.05
)


@pytest.fixture(scope="module")
def outcome():
    pipe = small.build()
    return pipe, quantize(pipe, QUICK, progress=False)


def test_groups_cover_all_steps_with_scales_each_and_none_is_kept_worse_than_it_was_calibrated(outcome):
    pipe, report = outcome
    assert [group.name for group in report.scales.units] == ["steps 0 to 1", "steps 2 to 3"]
    assert all(group.after <= group.before for group in report.scales.units)
    assert any(group.after < group.before for group in report.scales.units)
    tables = [quantizer.tables for quantizer in quantizers_of(pipe.unet).values()]
    assert all(table is not None and sorted(table) == [0, 1] for table in tables)
    assert any(not torch.equal(t[0][0].scale, t[1][0].scale) for t in tables)


def test_the_error_reported_for_a_group_is_that_of_the_pipeline_s_own_states(outcome):
    pipe, report = outcome
    quantized, exact = (small.states_of(p, steps=4, batch=2)[2] for p in (pipe, small.build()))
    distance = (quantized - exact).square().flatten(1).sum(1).mean()
    assert float(distance) == pytest.approx(report.scales.units[0].after, rel=1e-3)


def test_class_conditional_guidance_in_one_batch_is_followed_whichever_branch_comes_first():
    pipe = HOSTS["dit"].build()
    pipe.set_progress_bar_config(disable=True)
    config = dataclasses.replace(QUICK, steps=2, group_size=1, iterations=1)
    with pytest.raises(ConfigError, match="expected x <- step\\(network\\(x\\)\\), got states that differ"):
        quantize(pipe, config, progress=False)
    report = quantize(pipe, dataclasses.replace(config, guidance_scale=4.0), progress=False)
    assert len(report.scales.units) == 2
    modiff.remove(pipe)


def test_settings_samplers_with_a_memory_and_modules_that_cannot_be_are_refused():
    for name, value in (
        ("group_size", 0),
        ("activation_bits", None),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
    ):
        with pytest.raises(ConfigError, match=rf"AccuquantConfig\.{name}: expected .*, got {value}"):
            dataclasses.replace(QUICK, **{name: value})
    pipe = set_scheduler(HOSTS["ddpm"].build(), "dpmsolver++")
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ConfigError, match="expected DDIM or Euler steps of flow matching, got another sampler"):
        quantize(pipe, QUICK, progress=False)
    with pytest.raises(ConfigError, match="expected a pipeline, got a module alone"):
        quantize(pipe.unet, QUICK, progress=False)


def test_the_sampler_s_tables_come_back_and_damaged_ones_are_refused(tmp_path):
    used, fresh = (FlowMatchEulerDiscreteScheduler(shift=3.0) for _ in range(2))
    used.set_timesteps(4, mu=None)
    save_tables(used, path := tmp_path / "sampler.safetensors")
    copied = as_recorded(fresh, path)
    assert_same_bits(copied.sigmas, used.sigmas)
    assert (copied.num_inference_steps, len(fresh.timesteps)) == (4, 1000), "the pipeline's own is left alone"
    (singlestep := DPMSolverSinglestepScheduler(solver_order=2)).set_timesteps(4)
    save_tables(singlestep, other := tmp_path / "orders.safetensors")
    assert as_recorded(DPMSolverSinglestepScheduler(solver_order=2), other).order_list == singlestep.order_list
    for damage in (lambda: path.write_bytes(path.read_bytes()[:20]), path.unlink):
        damage()
        with pytest.raises(FormatError, match=r"sampler\.safetensors: expected the tables of a sampler, got"):
            as_recorded(fresh, path)


def test_recorded_states_lie_where_the_network_is(monkeypatch):
    network = torch.nn.Linear(3, 3, device="meta")
    monkeypatch.setattr(SamplerSteps, "mismatch", lambda self: 0.0)
    monkeypatch.setattr(SamplerSteps, "follow", lambda self, step: self.recorded[step])
    calls = [Call((torch.randn(4, 3), 9.0 - step), {}, step, 9.0 - step) for step in range(2)]
    for guidance in (None, 3.0):
        steps = SamplerSteps(network, DDIMScheduler(), calls, guidance)
        assert {state.device.type for state in steps.recorded} == {"meta"}
        assert len(steps.recorded[0]) == (4 if guidance is None else 2)


CARRY, DRIFT = 0.97, -0.11


class Net:
    """eps(x, k) = tanh(mix x W_k) + b_k with two leaves; mix 0 makes it blind to its input state."""

    def __init__(self, mix: float) -> None:
        generator = torch.Generator().manual_seed(5)
        self.mix = mix
        self.weight = torch.randn(8, 6, 6, generator=generator, dtype=torch.float64) / 3
        self.scale = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
        self.bias = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
        self.unused = torch.ones(2, dtype=torch.float64, requires_grad=True)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.scale, self.bias, self.unused]

    def evaluate(self, step: int, state: Tensor) -> Tensor:
        return self.scale[step % 2] * torch.tanh(self.mix * state @ self.weight[step] + 0.3 * step) + self.bias


def advance(step: int, state: Tensor, output: Tensor) -> Tensor:
    return (CARRY * state + DRIFT * (1 + step) * output).clamp(-2, 2)


def group(steps: int) -> Group:
    generator = torch.Generator().manual_seed(6)
    start, target = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return Group(range(2, 2 + steps), start, target)


def cosine(mine: list[Tensor], true: list[Tensor]) -> float:
    a, b = (torch.cat([t.flatten() for t in gradients]) for gradients in (mine, true))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(("steps", "mix"), [(1, 1.0), (1, 0.0), (4, 0.0), (6, 0.0)])
def test_the_gradient_is_exact_for_one_step_and_for_a_network_blind_to_its_state(steps: int, mix: float) -> None:
    net = Net(mix)
    error, gradients = approximate_gradient(group(steps), net.evaluate, advance, net.leaves)
    true_error, expected = exact_gradient(group(steps), net.evaluate, advance, net.leaves)
    assert error == pytest.approx(true_error, rel=1e-12)
    for mine, true in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("steps", "least"), [(2, 0.95), (4, 0.9)])
def test_the_approximate_gradient_points_where_the_exact_one_does(steps: int, least: float) -> None:
    net = Net(0.5)
    _, gradients = approximate_gradient(group(steps), net.evaluate, advance, net.leaves)
    _, expected = exact_gradient(group(steps), net.evaluate, advance, net.leaves)
    assert least < cosine(gradients, expected) < 1 - 1e-6


def alive_at_most(steps: int) -> int:
    """The most values that autograd kept at any time."""
    history = [0]

    def keep(tensor: Tensor) -> Tensor:
        copy, values = tensor.detach().clone(), tensor.numel()
        history.append(history[-1] + values)
        weakref.finalize(copy, lambda: history.append(history[-1] - values))
        return copy

    net = Net(0.5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        approximate_gradient(group(steps), net.evaluate, advance, net.leaves)
    return max(history)


def test_the_memory_of_the_graph_does_not_grow_with_the_group() -> None:
    assert 0 < alive_at_most(6) <= alive_at_most(1)
