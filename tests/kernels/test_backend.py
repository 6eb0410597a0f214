"""Prepared weights follow the memory they were made from: found through views, renewed after writes, freed with it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from modiff.kernels.backend import Prepacked


class Counted(Prepacked):
    """A store that counts how often something was made."""

    calls = 0

    def make(self) -> tuple[Tensor, ...]:
        self.calls += 1
        return (torch.zeros(10),)

    def ask(self, weight: Tensor, kind: str = "a") -> int:
        self.get(weight, kind, self.make)
        return self.calls


@pytest.mark.parametrize("inference", [False, True])
def test_one_memory_is_prepared_once_through_views_and_again_after_a_write_that_tensors_count(inference):
    store = Counted()
    with torch.inference_mode(inference):
        weight = torch.nn.Parameter(torch.ones(4, 3), requires_grad=False)
        assert {store.ask(same) for same in (weight, weight.detach(), weight.data, weight.view(4, 3))} == {1}
        assert [store.ask(weight, "b"), store.ask(weight.detach()[1:])] == [2, 3]
        weight.add_(1)
        assert [store.ask(weight), store.ask(weight)] == [3 + (not inference)] * 2


def test_nothing_outlives_the_weight_and_new_memory_at_its_address_is_not_taken_for_it():
    store, weight = Counted(), torch.ones(4, 3)
    store.ask(weight)
    view = weight[1:]
    del weight
    gc.collect()
    assert store.bytes_held() == store.bytes_of(view) == 40
    del view
    gc.collect()
    assert store.bytes_held() == 0
    for _ in range(20):
        store.ask(torch.ones(4, 3))
    assert store.calls == 21
