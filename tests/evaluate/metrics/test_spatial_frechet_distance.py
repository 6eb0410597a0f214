"""Spatial Frechet distance: the rows of the convention, and that places count."""

from __future__ import annotations

import pytest
import torch

from modiff.errors import ConfigError
from modiff.evaluate.metrics.frechet_distance import frechet_distance
from modiff.evaluate.metrics.moments import Moments
from modiff.evaluate.metrics.spatial_frechet_distance import spatial_frechet_distance, spatial_rows


def test_a_row_holds_the_first_seven_channels_at_every_position() -> None:
    maps = torch.randn(2, 9, 3, 4)
    rows = spatial_rows(maps)
    assert rows.shape == (2, 7 * 3 * 4)
    assert torch.equal(rows.view(2, 7, 3, 4), maps[:, :7])


def test_narrow_maps_are_taken_whole_and_averaged_ones_are_refused() -> None:
    assert spatial_rows(torch.zeros(2, 3, 4, 4)).shape == (2, 48)
    with pytest.raises(ConfigError, match=r"feature maps \(N, C, H, W\), got \(2, 3\)"):
        spatial_rows(torch.zeros(2, 3))


def test_mirrored_maps_are_far_away_while_their_averages_are_the_same() -> None:
    maps = torch.rand(50, 2, 1, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    mirrored = maps.flip(3)
    pooled = [Moments.of(m.mean(dim=(2, 3))) for m in (maps, mirrored)]
    assert frechet_distance(*pooled) == pytest.approx(0, abs=1e-9)
    moved = sum((a - b) ** 2 for a, b in zip((1, 2, 3, 4), (4, 3, 2, 1), strict=True)) * 2 / 4  # of the means alone
    assert spatial_frechet_distance(spatial_rows(maps), spatial_rows(mirrored)) > 0.8 * moved


def test_moments_and_rows_give_the_same() -> None:
    a, b = torch.randn(9, 4), torch.randn(9, 4)
    found = spatial_frechet_distance(Moments.of(a), b)
    assert found == spatial_frechet_distance(a, Moments.of(b)) == frechet_distance(Moments.of(a), Moments.of(b))
