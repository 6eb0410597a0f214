"""Bars: none without a terminal, and time left that costly steps do not blow up."""

import io

import pytest

from modiff import progress
from modiff.evaluate.timing import TimeBar
from modiff.progress import Bar
from tests.helpers import Terminal


@pytest.mark.parametrize(("stream", "quiet", "bars"), [(Terminal, False, 1), (Terminal, True, 0), (io.StringIO, 0, 0)])
def test_there_is_a_bar_on_a_terminal_only(stream: type, quiet: bool, bars: int, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr", stream())
    monkeypatch.setattr(Bar, "quiet", quiet)
    assert list(Bar(range(3), desc="images")) == [0, 1, 2]
    with TimeBar([("a", 1, 2)]) as bar:
        bar.begin("a"), bar.step()
    assert ("images" in progress.sys.stderr.getvalue()) == bool(bars)


def test_the_time_left_counts_seconds_of_each_kind_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cheap trajectory, a costly one of another weight, and both once more: a step is 1 s or 30 s."""
    now = [0.0]
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    parts = [("a", 1, 10), ("tuning", 20, 10), ("tuning", 1, 10), ("b", 20, 10)]
    bar = TimeBar(parts)
    left: list[float] = []
    for title, costs in (("a", [1] * 10), ("tuning", [30] * 10 + [1] * 10), ("b", [30] * 4)):
        bar.begin(title)
        for cost in costs:
            now[0] += cost
            bar.step()
            left.append(bar.total - bar.n)
    exact = [sum(([1] * 10 + [30] * 10 + [1] * 10 + [30] * 10)[i + 1 :]) for i in range(len(left))]
    assert left[9] == pytest.approx(20 * 20 + 10)  # nothing of that weight was timed yet: 20 s a step
    assert left[10:] == pytest.approx(exact[10:])
