"""The rows of bench/integers.py: what is compared with what, and that states in 16 bits are half."""

import pytest

import integers
from tests.hosts.tiny import HOSTS


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


def test_memory_has_a_row_for_each_budget_and_rule_and_a_ratio_for_states_in_16_bits(monkeypatch, capsys):
    monkeypatch.setattr(integers, "SHARES", (1.0, 0.0))
    monkeypatch.setattr(integers.budgets, "__defaults__", (3,))
    monkeypatch.setattr(integers.int16_ratio, "__defaults__", (3,))
    pipe = HOSTS["ddim"].build()
    pipe.set_progress_bar_config(disable=True)
    result = integers.memory(pipe, num_images=1, rounds=1)
    assert [(row["config"], row["share"], row["mib"] > 0) for row in result["budgets"][::2]] == [
        ("w8a8", 1.0, True), ("w8a8", 0.0, False), ("w8a4", 1.0, True), ("w8a4", 0.0, False)
    ]  # fmt: skip
    assert all(0 < row["low"] == row["error_ratio"] for row in result["int16"])
    assert len(capsys.readouterr().out.splitlines()) == 8 + 3
