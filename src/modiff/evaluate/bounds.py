"""Bounds on the error of a layer's input state, from how far its input moves (MoDiff, arXiv:2506.22463, Thm 4.4).

Step 0 anchors the states in full precision. d_k is the input's move at step k = 1, 2, ..., and the quantizer
loses at most
a share c of the energy of what it is given: ||r - code(r)||² <= c ||r||². All lists start with the value at step 1.

The errors are those of the input side, e_k = a_k - â_k. A linear operator A turns them into errors of the output state
of at most ||A|| ||e_k||, which is the factor ||A|| of the paper; both curves of a comparison would carry it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LARGEST = 1e300
"""Bounds beyond it are cut here: JSON has no infinity, and nothing is learned from one."""


def uncompensated_bound(c: float, moves: Sequence[float]) -> list[float]:
    """||E_t|| <= sqrt(c) Σ_k ||d_k||: without compensation every step's rounding error stays, so they add up.

    E_t = E_{t+1} + (d_t - code(d_t)), then the triangle inequality: at most linear growth, and no condition on c.

    >>> uncompensated_bound(0.25, [1.0, 1.0, 1.0])
    [0.5, 1.0, 1.5]
    """
    bounds: list[float] = []
    total = 0.0
    for move in moves:
        total += math.sqrt(c) * move
        bounds.append(min(total, LARGEST))
    return bounds


def compensated_bound(c: float, moves: Sequence[float]) -> list[float]:
    """||e_t|| <= Σ_k c^{(k-t+1)/2} ||d_k||: with compensation a move of n steps ago has faded by c^{n/2}.

    e_t is what the quantizer loses of r_t = d_t + e_{t+1}: ||e_t|| <= sqrt(c) (||d_t|| + ||e_{t+1}||), bounded
    for c < 1.

    >>> compensated_bound(0.25, [1.0, 1.0, 1.0])
    [0.5, 0.75, 0.875]
    """
    bounds: list[float] = []
    error = 0.0
    for move in moves:
        error = math.sqrt(c) * (move + error)
        bounds.append(min(error, LARGEST))
    return bounds


def printed_uncompensated_bound(c: float, moves: Sequence[float]) -> list[float]:
    """The square root of Σ_k 2^{T-k-1} c ||d_k||², as Thm 4.4 is printed: the newest move weighs most.

    The proof's own recursion gives the opposite weights, 2^{k-t+1}, and the growth is an artefact of
    (a + b)² <= 2a² + 2b²; see `uncompensated_bound`. Here for comparison only.

    >>> printed_uncompensated_bound(0.25, [1.0, 0.0, 2.0])
    [0.5, 0.5, 2.0615528128088303]
    """
    return _weighted(2.0, c, moves)


def printed_compensated_bound(c: float, moves: Sequence[float]) -> list[float]:
    """The square root of Σ_k (2c)^{T-k-1} ||d_k||², as Thm 4.4 is printed: the oldest move weighs most.

    It is no bound: after some steps a new move has hardly any weight, while the error follows it at once. The proof's
    recursion gives (2c)^{k-t+1}; see `compensated_bound`. Here for comparison only.

    >>> printed_compensated_bound(0.125, [1.0, 0.0, 2.0])
    [1.0, 1.0, 1.118033988749895]
    """
    return _weighted(2.0 * c, 1.0, moves)


def _weighted(ratio: float, factor: float, moves: Sequence[float]) -> list[float]:
    """sqrt(Σ_j ratio^{j-1} factor d_j²) over the moves 1..i, for every i."""
    bounds: list[float] = []
    total, weight = 0.0, factor
    for move in moves:
        total = min(total + weight * move * move, LARGEST)
        weight = min(weight * ratio, LARGEST)
        bounds.append(math.sqrt(total))
    return bounds
