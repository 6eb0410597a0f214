"""Gates, and norms behind views, stay where they are unless a layer can compute them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch.nn import functional

import modiff
from tests.helpers import assert_within
from tests.nn.fusing import PLAIN, W8A8, Model, fused, taken


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    dynamo.reset()
    yield
    dynamo.reset()


def rows_of_tokens(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.norm(x).reshape(2, 7, 32))


def columns_first(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.norm(x.reshape(2, 32, 7, 1)).permute(2, 3, 0, 1).reshape(7, 2, 32))


def view_read_twice(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x.transpose(1, 2))
    return m.fc(y.transpose(1, 2)) + y.transpose(1, 2)


@pytest.mark.parametrize("call", [rows_of_tokens, columns_first, view_read_twice])
def test_a_norm_behind_views_that_do_more_than_make_tokens_stays_where_it_is(call):
    counts: list[int] = []
    model = taken(Model(call, norm=nn.GroupNorm(4, 32), fc=nn.Linear(32, 32)).eval(), PLAIN)
    x = torch.randn(2, 32, 7) if call is not view_read_twice else torch.randn(2, 7, 32)
    with torch.no_grad():
        assert_within(fused(model, counts)(x), model(x), 1e-5)
    assert sum(counts) == 0


def test_a_view_of_a_norm_need_not_be_one_of_what_it_reads():
    def a_part(m: Any, x: Tensor) -> Tensor:
        return m.fc(m.norm(x[..., :3]).view(2, 32, -1).transpose(1, 2))

    counts: list[int] = []
    model = taken(Model(a_part, norm=nn.GroupNorm(4, 32), fc=nn.Linear(32, 32)).eval(), PLAIN)
    x = torch.randn(2, 32, 5, 6)
    with torch.no_grad():
        assert_within(fused(model, counts)(x), model(x), 0.02)
    assert sum(counts) == 1


def test_a_view_as_a_type_is_no_view_of_tokens():
    def typed(m: Any, x: Tensor) -> Tensor:
        return m.fc(m.norm(x).view(torch.float32).transpose(1, 2))

    counts: list[int] = []
    model = taken(Model(typed, norm=nn.GroupNorm(4, 32), fc=nn.Linear(32, 32)).eval(), PLAIN)
    with torch.no_grad():
        fused(model, counts)(torch.randn(2, 32, 7))
    assert sum(counts) == 0


def gate_of_a_picture(m: Any, x: Tensor) -> Tensor:
    return m.conv(x * functional.silu(x + 1))


def gate_of_samples(m: Any, x: Tensor) -> Tensor:
    return m.fc(x * functional.silu(x.mean(1, keepdim=True)))


def gate_read_twice(m: Any, x: Tensor) -> Tensor:
    active = functional.silu(x + 1)
    return m.fc(x * active) + active


def gate_laid_otherwise(m: Any, x: Tensor) -> Tensor:
    return m.fc(x * functional.silu(x.transpose(1, 2).contiguous().transpose(1, 2)))


def gate_written(m: Any, x: Tensor) -> Tensor:
    gate = x + 1
    active = functional.silu(gate)
    gate.add_(1)
    return m.fc((x + gate) * active)


def gate_of_rows(m: Any, x: Tensor) -> Tensor:
    return m.fc(x[0] * functional.silu(x[1]))


@pytest.mark.parametrize("call", [gate_of_a_picture, gate_of_samples, gate_read_twice, gate_laid_otherwise,
                                  gate_written, gate_of_rows])  # fmt: skip
def test_a_gate_that_no_loop_reads_or_that_is_written_stays_where_it_is(call):
    counts: list[int] = []
    torch.manual_seed(0)
    model = taken(Model(call, conv=nn.Conv2d(16, 16, 3, padding=1), fc=nn.Linear(32, 32)).eval(), W8A8)
    picture = call is gate_of_a_picture
    with torch.no_grad(), modiff.trajectory(model):
        fused(model, counts)(torch.randn(2, 16, 6, 5) if picture else torch.randn(2, 7, 32))
    assert sum(counts) == 0
