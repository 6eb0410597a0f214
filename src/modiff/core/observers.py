"""Observers watch tensors and answer with a range: min-max, moving average, percentile, least loss under a metric.

A metric takes rows (R, N) with scales (R, 1) and gives one loss (R, 1) for each row; less is better. PTQ4DM (3.4)
compares L1, mean |x - Q(x)|^p, cosine and Kullback-Leibler, and found p = 2.4 the best of the four.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from modiff.core.affine import QParams, fake_quantize, qparams_from_range, quantize_tensor
from modiff.core.granularity import extremes, granularity_named
from modiff.errors import CalibrationError, ConfigError

KEPT_VALUES = 1 << 18
"""Percentile and least-error search keep at most this many values of each observed tensor, evenly drawn."""
KEPT_IN_ALL = 1 << 18
"""And at most this many of all tensors: beyond it one value of two is dropped, and of later tensors as well."""
SEARCHED_AT_ONCE = 1 << 20
"""Values of whole ranges that a search of many ranges looks at in one go: they stay in the processor's cache."""


def evenly_drawn(rows: Tensor, count: int, seed: int) -> Tensor:
    """`count` columns of (ranges, values): one from each of `count` equal stretches, at a random place in it.

    At equal distances the columns would fall together with the axes behind them: 2304 = 256 x 3 x 3 values taken nine
    apart are one tap of each kernel, and pixels taken 32 apart are the left edge of a picture.
    """
    length = rows.shape[1]
    if count >= length:
        return rows.clone()
    places = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), device="cpu")
    places += torch.arange(count, device="cpu")
    columns = places.mul_(length / count).long().clamp_(max=length - 1)
    return rows[:, columns.to(rows.device)]


class Observer:
    """Watches tensors: their smallest and largest value, of all, or for each index of the axis `channel_dim`."""

    def __init__(self, channel_dim: int | None = None) -> None:
        self.channel_dim = channel_dim
        self.minimum: Tensor | None = None
        self.maximum: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Take one tensor into account. Cost: two passes over x, no host sync."""
        x = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
        shared = granularity_named("tensor" if self.channel_dim is None else "input_channel")
        self._take(*extremes(x, shared, self.channel_dim or 0))

    def merge(self, other: "Observer") -> None:
        """Take into account all that another observer of the same kind saw."""
        self._take(*other.range())

    def range(self) -> tuple[Tensor, Tensor]:
        """The range to cover, broadcastable to the tensors. Raises: CalibrationError before the first tensor."""
        if self.minimum is None or self.maximum is None:
            raise CalibrationError(
                f"{type(self).__name__}: expected at least one tensor, got none. The layer never ran while "
                "calibrating. Exclude it, or give a forward loop that reaches it."
            )
        return self.minimum, self.maximum

    def qparams(self, bits: int, *, symmetric: bool = True, clip: float = 1.0) -> QParams:
        """Scale and zero point for the range seen."""
        low, high = self.range()
        return qparams_from_range(low, high, bits, symmetric=symmetric, clip=clip)

    def _take(self, low: Tensor, high: Tensor) -> None:
        if self.minimum is not None and self.maximum is not None:
            low, high = self._merged(self.minimum, self.maximum, low, high)
        self.minimum, self.maximum = low, high

    def _merged(self, minimum: Tensor, maximum: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return torch.minimum(minimum, low), torch.maximum(maximum, high)


class MinMaxObserver(Observer):
    """The smallest and the largest value ever seen."""


class MovingAverageObserver(Observer):
    """Extremes smoothed over the calls: range <- momentum * range + (1 - momentum) * extremes (Q-Diffusion: 0.95)."""

    def __init__(self, channel_dim: int | None = None, momentum: float = 0.95) -> None:
        super().__init__(channel_dim)
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum: expected a number in [0, 1), got {momentum}. 1 would never move. Try 0.95.")
        self.momentum = momentum
        self.count = 0

    def observe(self, x: Tensor) -> None:
        """Take one tensor into account."""
        super().observe(x)
        self.count += 1

    def merge(self, other: Observer) -> None:
        """The mean of both ranges, weighted with the tensors that each saw: they have no common order."""
        if not isinstance(other, MovingAverageObserver) or self.minimum is None or self.maximum is None:
            super().merge(other)
            return
        low, high = other.range()
        share = other.count / (self.count + other.count)
        self.minimum, self.maximum = self.minimum.lerp(low, share), self.maximum.lerp(high, share)
        self.count += other.count

    def _merged(self, minimum: Tensor, maximum: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return minimum.lerp(low, 1 - self.momentum), maximum.lerp(high, 1 - self.momentum)


class _SampleObserver(Observer):
    """Keeps evenly drawn values as well, at most `keep` of one tensor, for searches that need the distribution."""

    def __init__(self, channel_dim: int | None = None, keep: int | None = KEPT_VALUES) -> None:
        super().__init__(channel_dim)
        self.kept: list[Tensor] = []
        self.keep = keep
        self._thinning = 1
        self._draws = 0

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        rows = x.detach().flatten()[None] if self.channel_dim is None else x.detach().movedim(self.channel_dim, 0)
        rows = rows.flatten(1).float()
        length = rows.shape[1]
        most = length if self.keep is None else min(length, max(1, self.keep // max(1, rows.shape[0])))
        self._draws += 1
        self.kept.append(evenly_drawn(rows, -(-most // self._thinning), self._draws))
        self._thin_out()

    def merge(self, other: Observer) -> None:
        """Take into account all that another observer of the same kind saw."""
        super().merge(other)
        if isinstance(other, _SampleObserver):
            self.kept += other.kept
            self._thin_out()

    def _thin_out(self) -> None:
        while self.keep is not None and sum(kept.numel() for kept in self.kept) > KEPT_IN_ALL:
            if (rows := self._rows()).shape[1] == 1:
                break
            self._draws += 1
            self.kept = [evenly_drawn(rows, -(-rows.shape[1] // 2), self._draws)]
            self._thinning *= 2

    def _rows(self) -> Tensor:
        self.range()
        return torch.cat(self.kept, 1)  # (ranges, values)


class PercentileObserver(_SampleObserver):
    """The range that leaves out `(100 - percentile) / 2` percent of the values on either side."""

    def __init__(self, channel_dim: int | None = None, percentile: float = 99.9) -> None:
        super().__init__(channel_dim)
        if not 0 < percentile <= 100:
            raise ConfigError(f"percentile: expected (0, 100], got {percentile}. It is a share in percent. Try 99.9.")
        self.percentile = percentile

    def qparams(self, bits: int, *, symmetric: bool = True, clip: float = 1.0) -> QParams:
        """Scale and zero point for the central share of the values kept."""
        tail = (1 - self.percentile / 100) / 2
        rows = self._rows().sort(dim=1).values
        last = rows.shape[1] - 1
        shape = self.range()[0].shape
        low, high = rows[:, round(tail * last)].reshape(shape), rows[:, round((1 - tail) * last)].reshape(shape)
        return qparams_from_range(low, high, bits, symmetric=symmetric, clip=clip)


RangeMetric = Callable[[Tensor, QParams, int], Tensor]
"""(rows (R, N), scales (R, 1), bits) -> losses (R, 1)."""

BINS = 2048  # of the histogram that the Kullback-Leibler metric compares


def power(rows: Tensor, qparams: QParams, bits: int, p: float = 2.4) -> Tensor:
    """mean |x - Q(x)|^p."""
    error = (rows - fake_quantize(rows, qparams, bits)).abs()
    return (error if p == 1.0 else error.pow(p)).mean(1, keepdim=True)


def cosine(rows: Tensor, qparams: QParams, bits: int) -> Tensor:
    """1 - <x, Q(x)> / (||x|| ||Q(x)||); 1 where one of them is zero."""
    value = fake_quantize(rows, qparams, bits)
    product = (rows * value).sum(1, keepdim=True)
    norms = rows.norm(dim=1, keepdim=True) * value.norm(dim=1, keepdim=True)
    return 1 - product / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def kullback_leibler(rows: Tensor, qparams: QParams, bits: int) -> Tensor:
    """KL(P || P'), P: histogram of x over its whole range; P': the same with each code's mass spread over its bins.

    P' is what the codes still tell of P: bins of one code share their mean, over bins that are not empty. Values that
    saturate share a code, so a range that cuts a tail with structure loses it.
    """
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    width = ((high - low) / BINS).clamp_min(torch.finfo(rows.dtype).tiny)
    bins = ((rows - low) / width).long().clamp(0, BINS - 1)
    mass = torch.zeros(len(rows), BINS, dtype=torch.float64, device=rows.device)
    mass.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float64))
    mass = mass / rows.shape[1]
    centres = low + (torch.arange(BINS, device=rows.device) + 0.5) * width
    codes = quantize_tensor(centres, qparams, bits).long() + 2 ** (bits - 1)  # from 0
    filled = (mass > 0).double()
    per_code = torch.zeros(len(rows), 2**bits, dtype=torch.float64, device=rows.device)
    shared = per_code.scatter_add(1, codes, mass) / per_code.scatter_add(1, codes, filled).clamp_min(1)
    spread = shared.gather(1, codes)
    terms = torch.where(mass > 0, mass * (mass / spread.clamp_min(1e-300)).log(), torch.zeros_like(mass))
    return terms.sum(1, keepdim=True).to(rows.dtype)


l1 = functools.partial(power, p=1.0)
RANGE_METRICS: dict[str, RangeMetric] = {"l1": l1, "mse": power, "cosine": cosine, "kl": kullback_leibler}


class RangeSearchObserver(_SampleObserver):
    """The min-max range, shrunk by 1 % in each of 1 to 100 trials, with the least loss under a metric.

    keep: the most values of one tensor that decide; None for all.
    """

    def __init__(
        self,
        channel_dim: int | None = None,
        metric: RangeMetric = power,
        trials: int = 80,
        keep: int | None = KEPT_VALUES,
    ) -> None:
        super().__init__(channel_dim, keep)
        if not 1 <= trials <= 100:
            raise ConfigError(f"{type(self).__name__}: expected 1 to 100 trials, got trials={trials}. "
                              "Each trial shrinks by 1 %. Try trials=80.")  # fmt: skip
        self.metric, self.trials = metric, trials

    def qparams(self, bits: int, *, symmetric: bool = True, clip: float = 1.0) -> QParams:
        """Scale and zero point of the best of the trials, searched for each range alone. Cost: `trials` passes."""
        low, high = (r.reshape(-1, 1).float() for r in self.range())
        rows = self._rows()
        some = max(1, SEARCHED_AT_ONCE // max(1, rows.shape[1]))
        chunks = zip(rows.split(some), low.split(some), high.split(some), strict=True)
        chosen = torch.cat([self._best(*chunk, bits, symmetric=symmetric, clip=clip) for chunk in chunks])
        shape = self.range()[0].shape
        low, high = (low * chosen).reshape(shape), (high * chosen).reshape(shape)
        return qparams_from_range(low, high, bits, symmetric=symmetric, clip=clip)

    def _best(self, rows: Tensor, low: Tensor, high: Tensor, bits: int, *, symmetric: bool, clip: float) -> Tensor:
        best = torch.full_like(low, torch.inf)
        chosen = torch.ones_like(low)
        for trial in range(self.trials):
            ratio = 1 - 0.01 * trial
            qparams = qparams_from_range(low * ratio, high * ratio, bits, symmetric=symmetric, clip=clip)
            loss = self.metric(rows, qparams, bits)
            chosen = torch.where(loss < best, ratio, chosen)
            best = torch.minimum(best, loss)
        return chosen


class MSEObserver(RangeSearchObserver):
    """The range with the least mean |x - Q(x)|^p (p = 2.4; 80 trials in Q-Diffusion, 100 in PTQ4DM)."""

    def __init__(
        self, channel_dim: int | None = None, p: float = 2.4, trials: int = 80, keep: int | None = KEPT_VALUES
    ) -> None:
        if p <= 0:
            raise ConfigError(f"MSEObserver: expected p > 0, got p={p}. It is an exponent. Try p=2.4.")
        super().__init__(channel_dim, functools.partial(power, p=p), trials, keep)
