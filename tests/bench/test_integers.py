"""The rows of bench/integers.py: what is compared with what, and that states in 16 bits are half."""

import pytest
from torch import nn

import integers
from modiff import LayerConfig
from tests.helpers import assert_within
from tests.hosts.tiny import HOSTS
from tests.nn.building import walk
from tests.recipes import play, quantized, randomised


def test_rows_compare_integers_with_their_simulation():
    pipe = HOSTS["ddim"].build()
    pipe.set_progress_bar_config(disable=True)
    rows = {row["name"]: row for row in integers.measure(pipe, steps=4, num_images=1, seed=0)}
    assert list(rows) == list(integers.ROWS)
    for bits in ("W8A8", "W8A4"):
        simulated, found, fixed = (rows[f"{bits} {how}"] for how in
                                   ("simulated", "on integers, states in float32", "on integers"))  # fmt: skip
        assert simulated["to_simulation"] == 0
        assert 0 < found["to_simulation"] < 2 * simulated["relative_l2"]
        assert found["state_mib"] == simulated["state_mib"]
        assert fixed["state_mib"] == pytest.approx(found["state_mib"] / 2, rel=0.05)
        assert fixed["relative_l2"] < 4 * found["relative_l2"]


@pytest.fixture
def pipe():
    made = HOSTS["ddim"].build()
    made.set_progress_bar_config(disable=True)
    return made


def test_budgets_have_a_row_for_each_share_and_rule(pipe, monkeypatch, capsys):
    monkeypatch.setattr(integers, "SHARES", (1.0, 0.0))
    monkeypatch.setattr(integers.budgets, "__defaults__", (3,))
    result = integers.memory(pipe, "budgets", num_images=1, rounds=1)
    assert [(row["config"], row["share"], row["mib"] > 0) for row in result[::2]] == [
        ("w8a8", 1.0, True), ("w8a8", 0.0, False), ("w8a4", 1.0, True), ("w8a4", 0.0, False)
    ]  # fmt: skip
    assert len(capsys.readouterr().out.splitlines()) == len(result)


def test_each_choice_of_states_is_compared_with_float32_on_the_same_execution(pipe, monkeypatch):
    monkeypatch.setattr(integers, "CHOICES", {k: v for k, v in integers.CHOICES.items() if "12 and" not in k})
    for row in integers.choices(pipe, "w8a8", 1, 1, steps=3):
        bits = [int(word) for word in row["states"].split() if word.isdigit()] or [32 if "32" in row["states"] else 16]
        assert min(bits) / 32 <= row["share"] <= 1.05 * max(bits) / 32
        assert row["relative_l2"] < 0.05 or min(bits) < 16, "to the same images in full precision"
        assert (row["seconds"] is None, row["error_ratio"] == 1) == ("sim" in row["states"], "float32" in row["states"])


def test_narrow_states_are_multiples_of_a_grid_that_their_bits_hold():
    layer, inputs = quantized(randomised(nn.Linear(64, 64)), LayerConfig()), walk((2, 3, 64))
    with integers.narrowed(integers.Narrow(5, 6)) as bits:
        steps = play(layer, inputs)
    started = layer.operator.anchor(steps[0][1])
    for value, states, number, axis in ((inputs[0], 1, 5, -1), (started, 2, 6, 1)):
        grid = 1.25 * value.abs().amax(axis, keepdim=True) / (2 ** (number - 1) - 1)
        for step in steps:
            multiple = step[states] / grid
            assert_within(multiple, multiple.round(), 1e-3)
    assert bits == {("reads", "layer"): 2 * 3 * 64 * 5, ("writes", "layer"): 2 * 3 * 64 * 6}
