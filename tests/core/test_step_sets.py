"""Finite sets of scales: who shares one, no set for a step that was not calibrated, and bit-equal tensors of them."""

import pytest
import torch

from modiff import CalibrationError, FormatError, QuantizerConfig
from modiff.core.observers import MinMaxObserver
from modiff.core.quantizer import Quantizer
from modiff.core.step_sets import grouped, read_scale_tensors, set_of
from tests.helpers import assert_same_bits


def watched(values: dict[float, float]) -> dict[tuple[float, ...], tuple[MinMaxObserver, ...]]:
    sets = {}
    for timestep, largest in values.items():
        observer = MinMaxObserver()
        observer.observe(torch.tensor([-largest, largest]))
        sets[(timestep,)] = (observer,)
    return sets


@pytest.mark.parametrize(("groups", "sizes"), [(0, [1] * 5), (1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (9, [1] * 5)])
def test_groups_are_runs_of_neighbours_that_cover_the_largest_range_of_their_members(groups, sizes):
    values = {float(t): float(t) for t in (20, 10, 40, 30, 50)}
    sets, moments = grouped(watched(values), groups)
    members = [[t for (t,), i in moments.items() if i == index] for index in sorted(sets)]
    assert [len(m) for m in members] == sizes
    assert [t for m in members for t in m] == sorted(values, reverse=True)
    assert [sets[i][0].range()[1].item() for i in sorted(sets)] == [max(m) for m in members]


def test_a_moment_is_sets_up_to_float32_rounding_and_no_further():
    moments = {(0.1,): 0, (999.0,): 1}
    assert set_of((float(torch.tensor(0.1)),), moments) == 0
    assert set_of((999.0,), moments) == 1
    for wrong in (998.0, 999.1, 0.101, 500.0):
        with pytest.raises(CalibrationError, match="expected a step of the 2 calibrated ones, timestep 999 to"):
            set_of((wrong,), moments)
    assert set_of((900.0, 950.0), {(900.0, 950.0): 0}) == 0  # a residual, and one after another step size
    with pytest.raises(CalibrationError, match="got timestep 900 after 1000"):
        set_of((900.0, 1000.0), {(900.0, 950.0): 0})


def quantizer_of(runs=(3, 5), granularity="tensor", **settings) -> Quantizer:
    moment = settings.pop("moment", None)
    return Quantizer(QuantizerConfig(dynamic=False, **settings), granularity, -1, runs, moment)


def measured(original: Quantizer, now: list[float] | None = None) -> Quantizer:
    original.watch(lambda: MinMaxObserver(-1 if original.granularity == "input_channel" else None))
    for i in range(3):
        if now is not None:
            now[0] = 10.0 - i
        original(torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) * (1 + i))
    original.freeze()
    return original


def same(a: Quantizer, b: Quantizer, x: torch.Tensor) -> None:
    for (mine, p), (true, q) in zip(a(x).parts, b(x).parts, strict=True):
        assert_same_bits(mine, true)
        assert_same_bits(p.scale, q.scale)


@pytest.mark.parametrize("granularity", ["tensor", "input_channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("runs", [(8,), (3, 5)])
def test_one_set_comes_back_bit_for_bit(granularity, symmetric, runs):
    original = measured(quantizer_of(runs, granularity, symmetric=symmetric))
    tensors = original.state_dict_tensors()
    kinds = ["scale"] if symmetric else ["scale", "zero_point"]
    assert set(tensors) == {f"{kind}.{i}" for kind in kinds for i in range(len(runs))}
    copy = quantizer_of(runs, granularity, symmetric=symmetric)
    copy.load_tensors(tensors)
    same(copy, original, torch.randn(4, 8))
    copy.load_tensors({})
    assert copy.state_dict_tensors() == {}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("step_groups", [0, 2])
def test_sets_for_groups_of_steps_come_back_bit_for_bit(symmetric, step_groups):
    now = [0.0]
    moment = lambda: (now[0],)  # noqa: E731
    original = measured(quantizer_of(symmetric=symmetric, step_groups=step_groups, moment=moment), now)
    tensors = original.state_dict_tensors()
    assert tensors["moments"].tolist() == [[10.0], [9.0], [8.0]]
    assert tensors["moment_sets"].tolist() == ([0, 1, 2] if step_groups == 0 else [0, 0, 1])
    assert tensors["step_scale.1"].shape[0] == (3 if step_groups == 0 else 2)
    copy = quantizer_of(symmetric=symmetric, step_groups=step_groups, moment=moment)
    copy.load_tensors(tensors)
    for now[0] in (10.0, 9.0, 8.0):
        same(copy, original, torch.randn(4, 8))


GOOD = {"scale.0": torch.ones(1, 1), "scale.1": torch.ones(1, 1)}
STEPS = {
    "step_scale.0": torch.ones(2, 1, 1),
    "moments": torch.tensor([[10.0], [9.0]]).double(),
    "moment_sets": torch.tensor([0, 1]),
}


@pytest.mark.parametrize(
    ("tensors", "channels", "message"),
    [
        ({"scale.0": torch.ones(1), "zero_point.0": torch.ones(1)}, (1,), "expected int32 zero points"),
        ({"scale.0": torch.ones(1)}, (1, 1), r"expected the tensors scale\.0, scale\.1, got scale\.0"),
        (GOOD | {"extra": torch.ones(1)}, (1, 1), "got extra, scale"),
        (GOOD | {"scale.1": torch.ones(1, 3)}, (1, 1), r"expected 1 x 1 scales, got \(1, 3\) torch.float32"),
        (GOOD | {"scale.1": torch.ones(1, 1, dtype=torch.int32)}, (1, 1), r"expected 1 x 1 scales"),
        (GOOD | {"scale.0": torch.zeros(1, 1)}, (1, 1), "expected finite scales above 0"),
        (GOOD | {"scale.0": torch.full((1, 1), torch.inf)}, (1, 1), "expected finite scales above 0"),
        (STEPS | {"moments": torch.zeros(2, 3)}, (1,), r"expected moments \(M, 1 or 2\)"),
        (STEPS | {"moment_sets": torch.tensor([0])}, (1,), r"expected moments \(M, 1 or 2\)"),
        (STEPS | {"moment_sets": torch.tensor([0, 10**15])}, (1,), "expected sets numbered from 0"),
        (STEPS | {"step_scale.0": torch.ones(3, 1, 1)}, (1,), r"expected 2 x 1 scales, got \(3, 1, 1\)"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(tensors, channels, message):
    with pytest.raises(FormatError, match=message):
        read_scale_tensors(tensors, channels, symmetric="zero_point.0" not in tensors)
