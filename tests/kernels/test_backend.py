"""Prepared weights follow the memory they were made from: found through views, renewed after writes, freed with it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modiff.kernels.backend import PREPACKED, Prepacked
from modiff.kernels.kernel import Kernel
from modiff.kernels.problem import Problem
from tests.helpers import assert_same_bits


@pytest.fixture
def store() -> tuple[Prepacked, list[int], Callable[[], tuple[Tensor, ...]]]:
    """An empty store, how often something was made, and the maker."""
    calls: list[int] = []
    return Prepacked(), calls, lambda: calls.append(1) or (torch.zeros(10),)


def test_one_memory_is_prepared_once_through_views_and_detached_tensors(store):
    (kept, calls, make), weight = store, torch.nn.Parameter(torch.ones(4, 3), requires_grad=False)
    for same in (weight, weight.detach(), weight.data, weight.view(4, 3)):
        kept.get(same, "a", make)
    assert len(calls) == 1
    kept.get(weight, "b", make)
    kept.get(weight.detach()[1:], "a", make)
    assert len(calls) == 3


@pytest.mark.parametrize("inference", [False, True])
def test_a_write_in_place_prepares_again_where_tensors_count_them(store, inference):
    kept, calls, make = store
    with torch.inference_mode(inference):
        weight = torch.ones(4, 3)
        kept.get(weight, "a", make)
        if not inference:
            weight.add_(1)
        for _ in range(2):
            kept.get(weight, "a", make)
    assert len(calls) == 1 + (not inference)


def test_nothing_outlives_the_weight(store):
    (kept, _, make), weight = store, torch.ones(4, 3)
    kept.get(weight, "a", make)
    view = weight[1:]
    del weight
    gc.collect()
    assert kept.bytes_held() == kept.bytes_of(view) == 40
    del view
    gc.collect()
    assert kept.bytes_held() == 0


def test_new_memory_at_an_old_address_is_not_taken_for_the_old_weight(store):
    kept, calls, make = store
    for _ in range(20):
        kept.get(torch.ones(4, 3), "a", make)
    assert len(calls) == 20


@pytest.mark.parametrize("backend", ["float_exact", "onednn"])
def test_a_kernel_sees_a_weight_that_was_overwritten(backend):
    weight, codes = torch.ones(3, 16, dtype=torch.int8), torch.full((2, 16), 9, dtype=torch.uint8)
    kernel = Kernel(Problem(16, 3, bits=4), weight, torch.ones(3), backend=backend)
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
