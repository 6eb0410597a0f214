"""Comparisons that NaN, a wrong shape or a wrong order cannot pass, and inputs that drift as activations do."""

import io
import signal
from collections.abc import Mapping

import torch
from torch import Tensor


class Terminal(io.StringIO):
    """A stream that says it is a terminal: bars are shown there only."""

    def isatty(self) -> bool:
        return True


def _difference(actual: Tensor, exact: Tensor) -> Tensor:
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    return (actual.detach().double() - exact.detach().double()).abs()


def worst(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference in float64. Infinite for NaN; AssertionError for another shape."""
    difference = _difference(actual, exact)
    return float("inf") if difference.isnan().any() else float(difference.max())


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """Every element of `actual` lies within `bound` (a number, or one for each element) of `exact`."""
    difference = _difference(actual, exact)
    excess = (difference - bound).max()
    assert bool((difference <= bound).all()), f"worst difference {difference.max():.3e}, {excess:.3e} over the bound"


def assert_float_error(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The house rule: at most twice the error of plain torch in the same dtype, both against float64."""
    assert actual.dtype == plain.dtype, f"{actual.dtype} compared with {plain.dtype}"
    ours, theirs = worst(actual, exact), worst(plain, exact)
    assert ours <= 2 * theirs, f"error {ours:.3e}, plain torch {theirs:.3e}"


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and every bit."""
    assert actual.dtype == expected.dtype, f"{actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {actual.numel()} elements differ"


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal names, and every bit of what they name."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def drifting(
    seed: int, shape: tuple[int, ...], steps: int, change: float, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Stationary Gaussian inputs; each step replaces a share `change` (relative L2) of the one before."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64)]
    for _ in range(steps - 1):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        found.append((1 - change**2) ** 0.5 * found[-1] + change * noise)
    return [x.to(dtype) for x in found]


def hears_ctrl_c() -> None:
    """For `subprocess.Popen(preexec_fn=...)`: a shell that started the tests in the background made them deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
