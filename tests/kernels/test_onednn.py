"""The self-test believes nothing: sums that saturate, fail or are missing are found out, and kernels heed it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from modiff.kernels import dispatch
from modiff.kernels.exact import REFERENCE
from modiff.kernels.isa import Isa, Trust, detect
from modiff.kernels.kernel import Kernel
from modiff.kernels.onednn import ONEDNN, self_test
from modiff.kernels.problem import Problem
from modiff.kernels.product import NATIVE
from tests.kernels.problems import along


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """The self-test as a new process has it; what it shows here is forgotten."""
    self_test.cache_clear()
    yield
    self_test.cache_clear()


def right(operator, codes):
    return REFERENCE.sums(operator, codes).float()


def wrong(operator, codes):
    return right(operator, codes) + 1


def pairs_in_16_bits(operator, codes):
    """What processors without VNNI do: products are added in pairs, and each pair saturates."""
    if operator.axes:
        return right(operator, codes)
    products = codes.long().unsqueeze(-2) * operator.weight_codes().long()
    products = torch.nn.functional.pad(products, (0, products.shape[-1] % 2))
    pairs = (products[..., ::2] + products[..., 1::2]).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(-1) - operator.zero_point * operator.weight_codes().long().sum(1)).float()


def refusing(error):
    def sums(*_):
        raise error

    return sums


@pytest.mark.parametrize(
    ("sums", "trust"),
    [
        (right, Trust(bounded=True, full=True)),
        (pairs_in_16_bits, Trust(bounded=True, full=False)),
        (wrong, Trust(bounded=False, full=False)),
        (refusing(RuntimeError("no primitive\nmore")), Trust(bounded=False, full=False, detail="no primitive")),
        (refusing(TypeError("18 arguments")), Trust(bounded=False, full=False, detail="18 arguments")),
    ],
)
def test_it_shows_what_the_operators_do_once_per_process(sums, trust, monkeypatch):
    monkeypatch.setattr(ONEDNN, "sums", sums)
    assert self_test() == trust
    monkeypatch.setattr(ONEDNN, "sums", refusing(AssertionError("asked again")))
    assert self_test() == trust


@pytest.mark.parametrize(("sizes", "backend"), [((3, 3), "reference"), ((), "float_exact")])
def test_a_torch_without_onednn_runs_without_asking_it(sizes, backend, monkeypatch):
    monkeypatch.setattr(NATIVE, "unsupported", lambda *_: "switched off")
    monkeypatch.setattr(ONEDNN, "sums", refusing(AssertionError("oneDNN was asked")))
    monkeypatch.setattr(dispatch, "detect", lambda: Isa(detect().level, onednn=False))
    made = Kernel(Problem(4, 3, **along(*sizes), bits=4), torch.ones(3, 4, *sizes, dtype=torch.int8), torch.ones(3))
    assert made.choice.backend == backend
    assert "no oneDNN" in made.choice.reason


@pytest.mark.skipif(not detect().onednn or detect().level == "other", reason="no oneDNN for this processor")
def test_a_kernel_on_this_machine_heeds_the_self_test(monkeypatch):
    monkeypatch.setattr(NATIVE, "unsupported", lambda *_: "switched off")
    monkeypatch.setattr(ONEDNN, "sums", wrong)
    made = Kernel(Problem(4, 3, bits=4), torch.ones(3, 4, dtype=torch.int8), torch.ones(3))
    assert made.choice.backend == "float_exact"
    assert "failed the self-test" in made.choice.reason
