"""Prepared weights follow the memory they were made from: found through views, renewed after writes, freed with it."""

from __future__ import annotations

import gc

import pytest
import torch

from modiff.kernels.backend import PREPACKED, Prepacked
from modiff.kernels.kernel import Kernel
from modiff.kernels.problem import Problem
from tests.helpers import assert_same_bits


def counting() -> tuple[list[int], object]:
    calls: list[int] = []

    def make() -> tuple[torch.Tensor, ...]:
        calls.append(1)
        return (torch.zeros(10),)

    return calls, make


def test_one_memory_is_prepared_once_through_views_and_detached_tensors():
    store, weight = Prepacked(), torch.nn.Parameter(torch.ones(4, 3), requires_grad=False)
    calls, make = counting()
    for same in (weight, weight.detach(), weight.data, weight.view(4, 3)):
        store.get(same, "a", make)
    assert len(calls) == 1
    store.get(weight, "b", make)
    store.get(weight.detach()[1:], "a", make)
    assert len(calls) == 3


def test_a_write_in_place_prepares_anew():
    store, weight = Prepacked(), torch.ones(4, 3)
    calls, make = counting()
    store.get(weight, "a", make)
    weight.add_(1)
    store.get(weight, "a", make)
    store.get(weight, "a", make)
    assert len(calls) == 2


def test_inference_tensors_are_prepared_once():
    with torch.inference_mode():
        store, weight = Prepacked(), torch.ones(4, 3)
        calls, make = counting()
        store.get(weight, "a", make)
        store.get(weight, "a", make)
    assert len(calls) == 1


def test_nothing_outlives_the_weight():
    store, weight = Prepacked(), torch.ones(4, 3)
    store.get(weight, "a", counting()[1])
    assert store.bytes_held() == 40
    view = weight[1:]
    del weight
    gc.collect()
    assert store.bytes_held() == 40
    del view
    gc.collect()
    assert store.bytes_held() == 0


def test_new_memory_at_an_old_address_is_not_taken_for_the_old_weight():
    store = Prepacked()
    calls, make = counting()
    for _ in range(20):
        store.get(torch.ones(4, 3), "a", make)
    assert len(calls) == 20


def test_a_kernel_sees_a_weight_that_was_overwritten():
    weight = torch.ones(3, 16, dtype=torch.int8)
    codes = torch.full((2, 16), 9, dtype=torch.uint8)
    for backend in ("float_exact", "onednn"):
        kernel = Kernel(Problem(16, 3, bits=4), weight.fill_(1), torch.ones(3), backend=backend)
        assert_same_bits(kernel.compute(codes, torch.tensor(1.0)), torch.full((2, 3), 16.0))
        held = PREPACKED.bytes_held()
        weight.fill_(-2)
        assert_same_bits(kernel.compute(codes, torch.tensor(1.0)), torch.full((2, 3), -32.0))
        assert PREPACKED.bytes_held() == held


@pytest.mark.parametrize(("backend", "each"), [("float_exact", 1 + 4), ("onednn", 1 + 1), ("reference", 1)])
def test_a_kernel_tells_every_byte_it_holds_beyond_the_floats(backend, each):
    weight = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
    kernel = Kernel(Problem(64, 32, bits=4, weight_max=8), weight, torch.ones(32), backend=backend)
    assert kernel.weight_bytes == 32 * 64 + 32 * 4  # codes and scales
    kernel.compute(torch.zeros(2, 64, dtype=torch.uint8), torch.tensor(1.0))
    assert each * 32 * 64 <= kernel.weight_bytes <= (each + 0.5) * 32 * 64
