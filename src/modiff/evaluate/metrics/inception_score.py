"""Inception score: are single images classified with certainty, and all together spread over the classes?"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics.rows import as_rows

_SUM = 1e-3
"""How far the probabilities of one image may be from 1 in total; float16 ones are within it."""


class InceptionScore(TypedDict):
    """Mean and population standard deviation over the splits, as published; not a confidence interval."""

    mean: float
    std: float
    splits: int


def inception_score(probabilities: Tensor | np.ndarray, *, splits: int = 10) -> InceptionScore:
    """exp(mean_x KL(p(y|x) || p(y))) of each of `splits` parts of the images, p(y) the mean over the part.

    Salimans et al. 2016 (arXiv:1606.03498). From 1 (all alike) to the number of classes K (certain and even). The parts
    are consecutive and as equal as can be; images by seed index need no shuffling. 0 log 0 counts as 0.

    Args:
        probabilities: p(y|x) of the classifier, (N, K), rows that sum to 1.
        splits: 10 as published; 1 for the score of all images, which is less biased and comes without a spread.
    Raises: ConfigError if they are not probabilities, or there are fewer images than splits.

    >>> inception_score(torch.eye(4), splits=1)["mean"]
    4.0
    """
    rows = as_rows(probabilities, "inception_score")
    total = rows.sum(1)
    if rows.numel() and (float(rows.min()) < 0 or float((total - 1).abs().max()) > _SUM):
        raise ConfigError(
            f"inception_score: expected probabilities, got rows with a sum of {float(total.min()):.4g} to "
            f"{float(total.max()):.4g} and a least value of {float(rows.min()):.4g}. Logits are none. "
            "Give logits.softmax(1)."
        )
    if type(splits) is not int or not 1 <= splits <= len(rows):
        raise ConfigError(
            f"inception_score: expected 1 to {len(rows)} splits for {len(rows)} images, got {splits!r}. Every part "
            "needs an image. Use splits=1 or more images."
        )
    rows = rows / total[:, None]
    scores = np.array([_score(part) for part in torch.tensor_split(rows, splits)])
    return {"mean": float(scores.mean()), "std": float(scores.std()), "splits": splits}


def _score(rows: Tensor) -> float:
    """exp(H(y) - H(y|x)), the same as the exponent of the mean divergence."""
    given = -torch.special.xlogy(rows, rows).sum(1).mean()
    marginal = rows.mean(0)
    return float((-torch.special.xlogy(marginal, marginal).sum() - given).exp())
