"""The bounds on the input error: the sums of the formulas, what they promise, and how the printed exponents fail."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modiff.evaluate.bounds import (
    LARGEST,
    compensated_bound,
    printed_compensated_bound,
    printed_uncompensated_bound,
    uncompensated_bound,
)

SHARES = st.floats(0.001, 0.99)
MOVES = st.lists(st.floats(0, 1e3), min_size=1, max_size=12)


def by_definition(c: float, moves: list[float], last: int) -> dict[str, float]:
    """All four at step `last`, with the paper's descending indices: step i is t = T - i, d_k is the move at T - k."""
    big_t = len(moves) + 1
    t = big_t - last
    move = {k: moves[big_t - k - 1] for k in range(t, big_t)}
    return {
        "uncompensated": math.sqrt(c) * sum(move.values()),
        "compensated": sum(c ** ((k - t + 1) / 2) * d for k, d in move.items()),
        "printed uncompensated": math.sqrt(sum(2 ** (big_t - k - 1) * c * d**2 for k, d in move.items())),
        "printed compensated": math.sqrt(sum((2 * c) ** (big_t - k - 1) * d**2 for k, d in move.items())),
    }


@given(SHARES, MOVES)
def test_the_bounds_are_the_sums_of_their_formulas(c: float, moves: list[float]) -> None:
    found = {
        "uncompensated": uncompensated_bound(c, moves),
        "compensated": compensated_bound(c, moves),
        "printed uncompensated": printed_uncompensated_bound(c, moves),
        "printed compensated": printed_compensated_bound(c, moves),
    }
    for step in range(1, len(moves) + 1):
        for name, value in by_definition(c, moves, step).items():
            assert found[name][step - 1] == pytest.approx(value, rel=1e-9, abs=1e-9)


def simulated(c: float, moves: list[list[float]], compensated: bool, seed: int) -> list[float]:
    """Error norms of a quantizer that loses a share of at most c of the energy, in any direction."""
    source = random.Random(seed)
    error = [0.0] * len(moves[0])
    norms = []
    for move in moves:
        given_to_coder = [m + e for m, e in zip(move, error, strict=True)] if compensated else move
        direction = [source.gauss(0, 1) for _ in move]
        scale = math.sqrt(c * source.random()) * math.hypot(*given_to_coder) / math.hypot(*direction)
        lost = [scale * x for x in direction]
        error = lost if compensated else [e + x for e, x in zip(error, lost, strict=True)]
        norms.append(math.hypot(*error))
    return norms


@given(SHARES, st.lists(st.tuples(*[st.floats(-10, 10)] * 3).map(list), min_size=1, max_size=20), st.integers(0, 99))
def test_no_coder_that_loses_a_share_c_exceeds_the_bounds(c: float, moves: list[list[float]], seed: int) -> None:
    sizes = [math.hypot(*move) for move in moves]
    for compensated, bound in ((True, compensated_bound), (False, uncompensated_bound)):
        for error, most in zip(simulated(c, moves, compensated, seed), bound(c, sizes), strict=True):
            assert error <= most * (1 + 1e-12) + 1e-12


def test_the_bounds_are_met_exactly_by_the_worst_coder() -> None:
    c, error, total = 0.3, 0.0, 0.0
    moves = [1.0, 0.2, 3.0, 0.0, 1.0]
    for step, move in enumerate(moves):
        error, total = math.sqrt(c) * (move + error), total + math.sqrt(c) * move
        assert compensated_bound(c, moves)[step] == pytest.approx(error)
        assert uncompensated_bound(c, moves)[step] == pytest.approx(total)


def test_a_jump_after_a_rest_breaks_the_printed_bound_and_not_the_corrected_one() -> None:
    """The printed weight of the newest move is (2c)^(T-t-1): after 20 steps a jump no longer counts, but is coded."""
    c = 0.04
    moves = [0.001] + [0.0] * 19 + [1.0]
    measured = simulated(c, [[m, 0.0, 0.0] for m in moves], compensated=True, seed=1)[-1]
    assert measured > 0.05
    assert measured > 10 * printed_compensated_bound(c, moves)[-1]
    assert measured <= compensated_bound(c, moves)[-1] == pytest.approx(0.2)


def test_with_compensation_an_old_move_fades_and_without_it_stays() -> None:
    moves = [1.0] + [0.0] * 30
    assert compensated_bound(0.25, moves)[-1] == pytest.approx(0.5**31)
    assert uncompensated_bound(0.25, moves)[-1] == pytest.approx(0.5)
    assert printed_compensated_bound(0.25, moves)[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bound", [uncompensated_bound, compensated_bound, printed_uncompensated_bound, printed_compensated_bound]
)
def test_bounds_stay_finite_over_thousands_of_steps(bound: object) -> None:
    values = bound(4.0, [1.0] * 3000)
    assert all(math.isfinite(v) and v <= LARGEST for v in values)
    assert sorted(values) == values
