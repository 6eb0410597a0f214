"""A bar that counts time, where steps differ in cost."""

import time
from collections.abc import Sequence

from modiff.progress import Bar

FULL, QUANTIZED, PROBED = 1.0, 1.5, 10.0
"""What a step costs about, compared with others, until one of its kind was timed; PROBED ones try many settings."""


class TimeBar(Bar):
    """Counts seconds: those spent, and those to be expected of the parts that are left.

    parts: (title, weight, steps) in the order in which they run. Steps of one weight are expected to cost the same;
        evaluations in a step (a sampler may need two) are counted in the first part.
    """

    def __init__(self, parts: Sequence[tuple[str, float, int]], *, shown: bool = True) -> None:
        form = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        super().__init__(total=1.0, bar_format=form, shown=shown)
        self._parts, self._count, self._in_step = list(parts), 0, 1.0
        self._spent: dict[float, tuple[float, int]] = {}
        self._start = self._last = time.perf_counter()

    def begin(self, title: str) -> None:
        """The parts of that title start now; those before it are over."""
        if self._count and self._parts:
            self._in_step = self._count / self._parts[0][2]
        while self._parts and self._parts[0][0] != title:
            self._parts.pop(0)
        self._count = 0
        self.set_description(title)

    def step(self) -> None:
        """One evaluation is done."""
        if self.disable or not self._parts:
            return
        title, weight, steps = self._parts[0]
        now, (seconds, count) = time.perf_counter(), self._spent.get(weight, (0.0, 0))
        self._spent[weight], self._last = (seconds + now - self._last, count + 1), now
        self._count += 1
        if self._count >= round(steps * self._in_step) and [part[0] for part in self._parts[1:2]] == [title]:
            self._parts.pop(0)
            self._count = 0
        self.total = now - self._start + self.left()
        self.update(now - self._start - self.n)

    def left(self) -> float:
        """Seconds to be expected."""
        mean = sum(s for s, _ in self._spent.values()) / sum(w * n for w, (_, n) in self._spent.items())
        rates = {weight: seconds / count for weight, (seconds, count) in self._spent.items()}
        costs = [rates.get(weight, weight * mean) for _, weight, _ in self._parts]
        counts = [steps * self._in_step for *_, steps in self._parts]
        counts[0] = max(0.0, counts[0] - self._count)
        return sum(cost * count for cost, count in zip(costs, counts, strict=True))
