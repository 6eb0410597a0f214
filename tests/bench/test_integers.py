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
                                   ("simulated", "on integers", "on integers, states in 16 bits"))  # fmt: skip
        assert simulated["to_simulation"] == 0
        assert 0 < found["to_simulation"] < 2 * simulated["relative_l2"]
        assert found["state_mib"] == simulated["state_mib"]
        assert fixed["state_mib"] == pytest.approx(found["state_mib"] / 2, rel=0.05)
        assert fixed["relative_l2"] < 4 * found["relative_l2"]
