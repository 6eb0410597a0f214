"""Frechet distance: closed forms, another algorithm, torchmetrics, singular covariances, and the bias of small sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from modiff.errors import ConfigError
from modiff.evaluate.metrics.frechet_distance import frechet_distance, symmetric_root
from modiff.evaluate.metrics.moments import Moments
from tests.evaluate.metrics.features import exact, feature_sets, gaussian, rotation
from tests.reference import metrics as reference

ZERO = torch.zeros(4, dtype=torch.float64)
ROTATION = rotation(1, 4)


def moments(mean: Tensor, covariance: Tensor) -> Moments:
    return Moments.given(mean, covariance, 100)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("turn", [torch.eye(4, dtype=torch.float64), ROTATION])
def test_gaussians_with_common_axes_are_apart_by_their_means_and_standard_deviations(turn: Tensor) -> None:
    mean = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    first = moments(ZERO, turn @ diagonal(1, 4, 9, 16) @ turn.T)
    second = moments(turn @ mean, turn @ diagonal(9, 4, 1, 0.25) @ turn.T)
    # |mean|² + (1 - 3)² + (2 - 2)² + (3 - 1)² + (4 - 0.5)²
    assert frechet_distance(first, second) == pytest.approx(5.25 + 4 + 0 + 4 + 12.25, rel=1e-12)


def test_two_gaussians_in_the_plane_have_the_root_of_a_2_by_2_matrix() -> None:
    a = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.9], [-0.9, 3.0]], dtype=torch.float64)
    # tr(M^½) = sqrt(tr M + 2 sqrt(det M)) for a 2 x 2 matrix with positive eigenvalues; M = A B does not commute
    product = a @ b
    root = torch.sqrt(product.trace() + 2 * torch.linalg.det(product).sqrt())
    expected = float(a.trace() + b.trace() - 2 * root)
    found = frechet_distance(Moments.given(ZERO[:2], a, 9), Moments.given(ZERO[:2], b, 9))
    assert found == pytest.approx(expected, rel=1e-12)


def test_features_with_given_moments_have_the_closed_form_distance() -> None:
    covariance = ROTATION @ diagonal(1, 2, 3, 4) @ ROTATION.T
    first, second = exact(0, 40, ZERO, covariance), exact(1, 60, ZERO + 1, 4 * covariance)
    # the same axes, twice the standard deviation: 4 + (2 - 1)² (1 + 2 + 3 + 4)
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(14, rel=1e-10)


@given(feature_sets(dimension=3, smallest=8), feature_sets(dimension=3, smallest=8))
def test_it_is_symmetric_positive_and_0_only_for_equal_moments(first: Tensor, second: Tensor) -> None:
    a, b = Moments.of(first), Moments.of(second)
    size = float(a.covariance().trace() + b.covariance().trace()) + float((a.mean - b.mean) @ (a.mean - b.mean))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9, abs=1e-6 * size)
    assert 0 <= frechet_distance(a, a) <= 1e-6 * size
    moved = Moments.of(first + 1)
    assert frechet_distance(a, moved) == pytest.approx(3, rel=1e-6, abs=1e-6 * size)


def test_it_agrees_with_an_iteration_on_the_product_itself() -> None:
    first = gaussian(0, 12, ZERO[:3], torch.eye(3, dtype=torch.float64))
    second = gaussian(1, 15, ZERO[:3] + 0.5, diagonal(0.3, 2, 1))
    expected = reference.frechet_distance(first.tolist(), second.tolist())
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(expected, rel=1e-9)


class Pixels(nn.Module):
    """Hands its images on as features."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_it_agrees_with_torchmetrics() -> None:
    first = gaussian(2, 50, torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    second = gaussian(3, 70, torch.ones(6, dtype=torch.float64), 2 * torch.eye(6, dtype=torch.float64))
    theirs = FrechetInceptionDistance(feature=Pixels(), normalize=True).set_dtype(torch.float64)
    theirs.update(first.view(-1, 1, 2, 3), real=True)
    theirs.update(second.view(-1, 1, 2, 3), real=False)
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_fewer_images_than_dimensions_give_the_distance_within_the_space_they_span() -> None:
    # three vectors in the plane, then turned into 40 dimensions: distances do not change, covariances become singular
    plane, other = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64) * 2 + 1
    frame = rotation(5, 40)[:, :2]
    expected = frechet_distance(Moments.of(plane), Moments.of(other))
    found = frechet_distance(Moments.of(plane @ frame.T), Moments.of(other @ frame.T))
    assert found == pytest.approx(expected, rel=1e-6)


def test_sets_that_vary_in_different_directions_share_no_root() -> None:
    first, second = torch.zeros(3, 8, dtype=torch.float64), torch.zeros(3, 8, dtype=torch.float64)
    first[:, 0], second[:, 1] = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-2.0, 0.0, 2.0])
    turn = rotation(6, 8)
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(1 + 4, rel=1e-12)
    turned = Moments.of(first @ turn), Moments.of(second @ turn)
    assert frechet_distance(*turned) == pytest.approx(1 + 4, rel=1e-7)


def test_constant_features_have_no_spread_and_only_the_means_count() -> None:
    assert frechet_distance(Moments.of(torch.zeros(3, 4)), Moments.of(torch.ones(5, 4))) == 4


def test_small_sets_of_one_distribution_are_apart_by_the_documented_bias() -> None:
    n, d = 200, 10
    zero, one = torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    found = [
        frechet_distance(Moments.of(gaussian(2 * i, n, zero, one)), Moments.of(gaussian(2 * i + 1, n, zero, one)))
        for i in range(60)
    ]
    # E = D (D + 5) / (2 n) to first order; the mean of 60 has a standard error of about 3 %
    assert sum(found) / len(found) == pytest.approx(d * (d + 5) / (2 * n), rel=0.12)


def test_the_root_is_symmetric_and_squares_to_the_covariance() -> None:
    covariance = ROTATION @ diagonal(0, 1e-4, 1, 100) @ ROTATION.T
    root = symmetric_root(covariance)
    torch.testing.assert_close(root, root.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(root @ root, covariance, rtol=0, atol=1e-11)
    assert float(torch.linalg.eigvalsh(root)[0]) == pytest.approx(0, abs=1e-12)


def test_a_matrix_that_is_no_covariance_is_an_error_in_place_of_an_imaginary_root() -> None:
    broken = moments(ZERO, diagonal(1, 1, 1, -0.01))
    with pytest.raises(ConfigError, match=r"positive semidefinite covariance, got an eigenvalue of -0\.01"):
        frechet_distance(moments(ZERO, diagonal(1, 1, 1, 1)), broken)


def test_sets_of_two_extractors_and_single_images_are_errors() -> None:
    with pytest.raises(ConfigError, match="one dimension, got 2 and 3"):
        frechet_distance(Moments.of(torch.ones(4, 2)), Moments.of(torch.ones(4, 3)))
    with pytest.raises(ConfigError, match="2 or more vectors, got 1"):
        frechet_distance(Moments.of(torch.ones(4, 2)), Moments.of(torch.ones(1, 2)))
