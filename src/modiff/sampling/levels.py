"""Noise levels of variance-preserving schedules, and the timesteps that a network knows them by."""

import torch
from torch import Tensor


def timestep_at(log_ratio: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The timestep t at which log(ab_t / (1 - ab_t)) is `log_ratio`, between two rows of the table by that logarithm.

    Returns: float64 of the shape of `log_ratio`, kept within 0 and the table's last row.
    """
    table = alphas_cumprod.double().cpu()
    rows, at = (table / (1 - table)).log().flip(0), log_ratio.double().cpu()
    above = torch.searchsorted(rows, at).clamp(1, len(rows) - 1)
    share = (at - rows[above - 1]) / (rows[above] - rows[above - 1])
    return (len(rows) - above - share).clamp(0, len(rows) - 1)
