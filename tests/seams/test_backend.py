"""A backend added from outside of the package: asked first, counted, refused by its own sentence, and taken away."""

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import presets
from modiff.kernels.backend import Backend, Operator
from modiff.kernels.dispatch import BACKENDS, Choice, backend_named, plan, register_backend, unregister_backend
from modiff.kernels.isa import Isa
from modiff.kernels.kernel import Kernel
from modiff.kernels.problem import Problem
from tests.helpers import assert_same_bits, assert_within
from tests.kernels.problems import exact_sums, operands


class Counting(Backend):
    """Adds up as another backend does, and counts how often it was asked; no layer of more than 64 inputs."""

    name = "counting"
    devices = ("cpu",)

    def __init__(self, inner: Backend) -> None:
        self.inner, self.calls = inner, 0

    def unsupported(self, problem: Problem, isa: Isa) -> str:
        return "counts to 64" if problem.inputs > 64 else self.inner.unsupported(problem, isa)

    def reason(self, problem: Problem, isa: Isa) -> str:
        return f"counted, on {self.inner.name}"

    def sums(self, operator: Operator, codes: Tensor) -> Tensor:
        self.calls += 1
        return self.inner.sums(operator, codes)


@pytest.fixture
def counting():
    backend = Counting(backend_named("float_exact"))
    register_backend(backend)
    yield backend
    if backend in BACKENDS:
        unregister_backend("counting")


def test_it_is_asked_first_and_its_reason_is_the_choice_s(counting):
    assert plan(Problem(64, 8), Isa("amx")) == Choice("counting", "counted, on float_exact")
    refused = plan(Problem(65, 8), Isa("amx"))
    assert refused.backend == "onednn"
    assert refused.refusals[0] == ("counting", "counts to 64")
    assert "counts to 64" in refused.reason


CONV = Problem(12, 10, (3, 3), (1, 1), (1, 1), (1, 1), bits=4)
ALONG = Problem(12, 10, (3,), (2,), (1,), (1,), bits=4)
POINT = Problem(12, 10, (1, 1), (1, 1), (0, 0), (1, 1), bits=4)


@pytest.mark.parametrize("problem", [Problem(12, 10, bits=4), CONV, ALONG, POINT])
@pytest.mark.parametrize("each", [False, True])
def test_what_it_does_not_write_follows_from_its_sums(problem, each, counting):
    codes, weight = operands(problem, 0)
    weight_scale, bias, ones = torch.rand(10) + 0.1, torch.randn(10), [1] * (codes.dim() - 1)
    scale = torch.rand(codes.shape[0], *ones) if each else torch.tensor(0.3)
    ours, theirs = (Kernel(problem, weight, weight_scale, backend=name) for name in ("counting", "reference"))
    assert_same_bits(ours.sums(codes).double(), exact_sums(problem, codes, weight))
    states = [kernel.new_output(codes) + 1 for kernel in (ours, theirs)]
    for kernel, state in zip((ours, theirs), states, strict=True):
        kernel.accumulate(state, codes, scale)
    outputs = [kernel.step(state, codes, scale) for kernel, state in zip((ours, theirs), states, strict=True)]
    for mine, exact in (states, outputs, [kernel.compute(codes, scale, bias) for kernel in (ours, theirs)]):
        assert_within(mine, exact, 1e-5 * float(exact.abs().max()))
    assert counting.calls == 4


def test_a_model_runs_on_it(counting):
    def output() -> Tensor:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
        for number, parameter in enumerate(model.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        modiff.apply(model, presets.w4a8().on_integers())
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad(), modiff.trajectory(model):
            return torch.stack([model(torch.randn(2, 32, generator=generator)) for _ in range(3)])

    ours = output()
    assert counting.calls == 2  # one layer of three is neither first nor last; its first step anchors
    unregister_backend("counting")
    assert_within(ours, output(), 1e-5)
    assert counting.calls == 2
