"""The self-test believes nothing: a backend that saturates, fails or is missing is found out."""

from __future__ import annotations

import pytest
import torch

from modiff.kernels import dispatch, kernel
from modiff.kernels.exact import REFERENCE
from modiff.kernels.isa import Isa, Trust, detect
from modiff.kernels.onednn import ONEDNN, self_test
from modiff.kernels.problem import Problem


@pytest.fixture
def fresh():
    """The self-test as a new process has it; what it finds here is forgotten."""
    self_test.cache_clear()
    yield
    self_test.cache_clear()


def pairs_in_16_bits(operator, codes):
    """What processors without VNNI do: products are added in pairs, and each pair saturates."""
    if operator.geometry.axes:
        return REFERENCE.sums(operator, codes).float()
    products = codes.long().unsqueeze(-2) * operator.weight_codes().long()
    if products.shape[-1] % 2:
        products = torch.nn.functional.pad(products, (0, 1))
    pairs = (products[..., ::2] + products[..., 1::2]).clamp(-(2**15), 2**15 - 1)
    zero = operator.zero_point * operator.weight_codes().long().sum(1)
    return (pairs.sum(-1) - zero).float()


def test_a_machine_that_saturates_is_trusted_with_few_bits_only(fresh, monkeypatch):
    monkeypatch.setattr(ONEDNN, "sums", pairs_in_16_bits)
    assert self_test() == Trust(bounded=True, full=False)


def test_a_machine_that_adds_up_right_is_trusted(fresh, monkeypatch):
    monkeypatch.setattr(ONEDNN, "sums", lambda *call: REFERENCE.sums(*call).float())
    assert self_test() == Trust(bounded=True, full=True)


def test_a_machine_that_is_wrong_everywhere_is_not_trusted_at_all(fresh, monkeypatch):
    monkeypatch.setattr(ONEDNN, "sums", lambda *call: REFERENCE.sums(*call).float() + 1)
    assert self_test() == Trust(bounded=False, full=False)


@pytest.mark.parametrize("error", [RuntimeError("could not create a primitive\nmore"), AttributeError("no operator")])
def test_an_operator_that_fails_is_a_finding_not_an_error(fresh, monkeypatch, error):
    def broken(*_call):
        raise error

    monkeypatch.setattr(ONEDNN, "sums", broken)
    assert self_test() == Trust(bounded=False, full=False, detail=str(error).splitlines()[0])


def test_it_runs_once_per_process(fresh, monkeypatch):
    calls = []
    monkeypatch.setattr(ONEDNN, "sums", lambda *call: calls.append(1) or REFERENCE.sums(*call).float())
    first = self_test()
    seen = len(calls)
    assert self_test() is first
    assert len(calls) == seen > 0


def test_a_torch_without_onednn_runs_without_asking_it(fresh, monkeypatch):
    def unreachable(*_call):
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr(ONEDNN, "sums", unreachable)
    monkeypatch.setattr(dispatch, "detect", lambda: Isa(detect().level, onednn=False))
    conv = Problem(4, 3, (3, 3), (1, 1), (1, 1), (1, 1), bits=4)
    made = kernel.Kernel(conv, torch.ones(3, 4, 3, 3, dtype=torch.int8), torch.ones(3))
    assert made.choice.backend == "reference"
    assert "no oneDNN" in made.choice.reason
    found = made.compute(torch.full((1, 4, 3, 3), 9, dtype=torch.uint8), torch.tensor(1.0))
    assert found[0, 0, 1, 1] == 36
    linear = kernel.Kernel(Problem(4, 3, bits=4), torch.ones(3, 4, dtype=torch.int8), torch.ones(3))
    assert linear.choice.backend == "float_exact"


def test_a_kernel_on_this_machine_heeds_the_self_test(fresh, monkeypatch):
    if not detect().onednn or detect().level == "other":
        pytest.skip("no oneDNN for this processor")
    monkeypatch.setattr(ONEDNN, "sums", lambda *call: REFERENCE.sums(*call).float() + 1)
    made = kernel.Kernel(Problem(4, 3, bits=4), torch.ones(3, 4, dtype=torch.int8), torch.ones(3))
    assert made.choice.backend == "float_exact"
    assert "failed the self-test" in made.choice.reason
