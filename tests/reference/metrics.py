"""Image metrics in plain Python numbers (float64), written from the formulas; imports nothing of modiff.

The matrix square root is that of the product itself, by the Denman-Beavers iteration: no eigendecomposition in it.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = Sequence[Sequence[float]]
Array = NDArray[np.float64]


def mean_and_covariance(rows: Rows) -> tuple[list[float], list[list[float]]]:
    n, d = len(rows), len(rows[0])
    mean = [math.fsum(row[i] for row in rows) / n for i in range(d)]
    covariance = [
        [math.fsum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) / (n - 1) for j in range(d)]
        for i in range(d)
    ]
    return mean, covariance


def matrix_root(matrix: Array) -> Array:
    """The principal square root of a well-conditioned matrix: Y <- (Y + Z⁻¹) / 2, Z <- (Z + Y⁻¹) / 2."""
    y, z = matrix, np.eye(len(matrix))
    for _ in range(60):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return y


def frechet_distance(first: Rows, second: Rows) -> float:
    (mean_a, cov_a), (mean_b, cov_b) = mean_and_covariance(first), mean_and_covariance(second)
    a, b = np.array(cov_a), np.array(cov_b)
    squares = math.fsum((x - y) ** 2 for x, y in zip(mean_a, mean_b, strict=True))
    return float(squares + np.trace(a) + np.trace(b) - 2 * np.trace(matrix_root(a @ b)))


def inception_score(rows: Rows, splits: int) -> list[float]:
    size = len(rows) // splits
    scores = []
    for first in range(0, size * splits, size):
        part = rows[first : first + size]
        marginal = [math.fsum(row[k] for row in part) / size for k in range(len(part[0]))]
        divergence = math.fsum(
            p * (math.log(p) - math.log(q)) for row in part for p, q in zip(row, marginal, strict=True) if p > 0
        )
        scores.append(math.exp(divergence / size))
    return scores


def polynomial_mmd(first: Rows, second: Rows) -> float:
    """Unbiased squared MMD with the kernel (xy / d + 1)³."""

    def kernel(x: Sequence[float], y: Sequence[float]) -> float:
        return (math.fsum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def among(rows: Rows) -> float:
        pairs = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return math.fsum(pairs) / len(pairs)

    across = [kernel(x, y) for x in first for y in second]
    return among(first) + among(second) - 2 * math.fsum(across) / len(across)


def within_manifold(queries: Rows, manifold: Rows, neighbours: int) -> list[bool]:
    """Which queries lie in the ball around a point of the manifold that reaches to its k-th nearest other point."""
    radii = [
        sorted(math.dist(point, other) for j, other in enumerate(manifold) if j != i)[neighbours - 1]
        for i, point in enumerate(manifold)
    ]
    return [
        any(math.dist(query, point) <= radius for point, radius in zip(manifold, radii, strict=True))
        for query in queries
    ]


def ssim(x: Array, y: Array, data_range: float = 255.0) -> float:
    """Of two grey images (H, W): an 11 x 11 window at a time."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    weights = {(i, j): math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for i in range(11) for j in range(11)}
    total = math.fsum(weights.values())
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            window = [
                (w / total, float(x[top + i, left + j]), float(y[top + i, left + j])) for (i, j), w in weights.items()
            ]
            mean_x, mean_y = (math.fsum(w * v[k] for w, *v in window) for k in (0, 1))
            var_x, var_y = (math.fsum(w * (v[k] - m) ** 2 for w, *v in window) for k, m in ((0, mean_x), (1, mean_y)))
            shared = math.fsum(w * (a - mean_x) * (b - mean_y) for w, a, b in window)
            values.append(
                (2 * mean_x * mean_y + c1) * (2 * shared + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
            )
    return math.fsum(values) / len(values)


def tensorflow_resize(image: Array, size: int) -> Array:
    """A grey image (H, W) to (size, size), pixel by pixel: output (i, j) is taken at (i H / size, j W / size)."""
    height, width = image.shape
    out = np.zeros((size, size))
    for i, j in np.ndindex(size, size):
        y, x = i * height / size, j * width / size
        top, left = math.floor(y), math.floor(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        dy, dx = y - top, x - left
        out[i, j] = (
            image[top, left] * (1 - dy) * (1 - dx)
            + image[top, right] * (1 - dy) * dx
            + image[bottom, left] * dy * (1 - dx)
            + image[bottom, right] * dy * dx
        )
    return out
