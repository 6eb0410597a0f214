"""What a unit is learned from: copies of its inputs and targets; rows of many calls in a batch where that is right."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from modiff import CalibrationError
from modiff.calibration.data import Call, tensors_of
from modiff.calibration.reconstruct.samples import UnitCall, UnitData, capture, paired
from tests.helpers import assert_same_bits


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def data_of(unit, visits, held_out=0.25) -> UnitData:
    run, generator = lambda batch: unit(*batch.args, **batch.kwargs), torch.Generator().manual_seed(0)
    return UnitData(visits, run, device=torch.device("cpu"), held_out=held_out, generator=generator, name="unit")


def visits_of(unit, inputs) -> list[UnitCall]:
    """Each element of `inputs` is (args, kwargs)."""
    with torch.no_grad():
        return [UnitCall(args, kwargs, tensors_of(unit(*args, **kwargs))) for args, kwargs in inputs]


def draws(data: UnitData, rows: int, count: int) -> list[UnitCall]:
    generator = torch.Generator().manual_seed(1)
    return [data.draw(rows, generator) for _ in range(count)]


def test_rows_of_different_calls_stand_in_one_batch_and_none_held_out_is_learned_on():
    unit = nn.Identity()
    data = data_of(unit, visits_of(unit, [((torch.arange(10 * i, 10 * i + 10.0)[:, None],), {}) for i in range(4)]))
    held = {float(x) for batch in data.held_batches(3) for x in batch.targets[0].flatten()}
    batches = draws(data, 7, 40)
    assert all(batch.rows == 7 == len(batch.targets[0].unique()) for batch in batches), "a row was drawn twice"
    learned = {float(x) for batch in batches for x in batch.targets[0].flatten()}
    assert (len(held), len(learned), draws(data, 100, 1)[0].rows) == (10, 30, 30)
    assert held | learned == {float(x) for x in range(40)}
    assert [batch.rows for batch in data.held_batches(3)] == [3, 3, 3, 1]


@pytest.mark.parametrize("change", ["shape", "table", "factor", "rows"])
def test_calls_that_differ_in_more_than_rows_never_meet_and_what_has_no_rows_is_shared(change):
    def unit(x: Tensor, table: Tensor, factor: float, *, extra: dict) -> Tensor:
        assert extra["name"] == "kept"
        return x * factor + table.sum() + extra["shift"]

    def inputs(i: int):
        odd = i % 2
        length = 5 if change == "shape" and odd else 3
        table = drawn(odd if change == "table" else 0, 2)
        extra = {"name": "kept", "shift": drawn(20 + i, 4, 1)}
        return (drawn(i, 4, length), table, 2.0 if change == "factor" and odd else 1.0), {"extra": extra}

    for batch in draws(data_of(unit, visits_of(unit, [inputs(i) for i in range(4)])), 8, 10):
        assert (batch.rows == 8) == (change == "rows")
        assert batch.args[1].shape == (2,)
        assert torch.allclose(unit(*batch.args, **batch.kwargs), batch.targets[0], atol=1e-6)


@pytest.mark.parametrize(
    ("unit", "inputs"),
    [
        (lambda x: x - x.mean(0), lambda i: ((drawn(i, 4, 3),), {})),
        (lambda x, table: x * table.sum(0), lambda i: ((drawn(i, 4, 3), drawn(99, 4, 3)), {})),
        (lambda x: (x, x.mean(0)), lambda i: ((drawn(i, 4, 3),), {})),
    ],
    ids=["rows depend on each other", "a table is mistaken for rows", "an output without rows"],
)
def test_calls_stay_whole_where_rows_do_not_stand_alone(unit, inputs):
    visits = visits_of(unit, [inputs(i) for i in range(6)])
    data = data_of(unit, visits)
    assert len(data.held) + len(data.training) == 6
    for batch in draws(data, 2, 6):
        assert batch.rows == 4
        for found, target in zip(tensors_of(unit(*batch.args)), batch.targets, strict=True):
            assert_same_bits(found, target)
    assert [batch.rows for batch in data.held_batches(2)] == [4] * len(data.held)


def test_at_least_one_sample_is_held_out_and_one_learned_on():
    for share in (0.01, 0.99):
        data = data_of(nn.Identity(), visits_of(nn.Identity(), [((drawn(0, 2, 3),), {})]), held_out=share)
        assert (len(data.held), len(data.training)) == (1, 1)
    for x, message in ((torch.ones(1, 3), "two calibration samples, got 1"), (torch.full((2, 1), torch.inf), "finite")):
        with pytest.raises(CalibrationError, match=f"unit: expected .*{message}"):
            data_of(nn.Identity(), visits_of(nn.Identity(), [((x,), {})]))


class Net(nn.Module):
    """Writes into its tensors, and runs its unit twice."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Linear(3, 3)
        self.after = nn.Linear(3, 3)
        self.evaluations = 0

    def forward(self, x: Tensor, *, flag: bool) -> Tensor:
        first = self.unit(x)
        x.add_(100.0)
        second = self.unit(first)
        first.mul_(0.0)
        self.evaluations += 1
        return self.after(second) if flag else second


@pytest.mark.parametrize("calls", [2, None])
def test_capture_copies_inputs_and_outputs_and_stops_after_the_last_call(calls):
    net, x = Net(), drawn(0, 2, 3)
    call = Call((x.clone(),), {"flag": True}, 0, None)
    with torch.inference_mode():  # tensors of inference mode can be learned from, too
        first, second = capture(net, "unit", dataclasses.replace(call, args=(x.clone(),)), calls, nullcontext())
    assert not first.args[0].is_inference()
    assert_same_bits(call.args[0], x)
    assert_same_bits(first.args[0], x)
    with torch.no_grad():
        assert_same_bits(first.targets[0], net.unit(x))
        assert_same_bits(second.args[0], net.unit(x))
    assert not second.targets[0].requires_grad
    assert net.evaluations == (0 if calls else 1)
    assert paired([first], [second], "unit") == [UnitCall(first.args, first.kwargs, second.targets)]
    with pytest.raises(CalibrationError, match="unit: expected the same calls in full precision and quantized, got 2"):
        paired([first], [first, second], "unit")
    assert not net.unit._forward_hooks
    assert not net.unit._forward_pre_hooks
