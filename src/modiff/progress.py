"""Bars on stderr, on a terminal only."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """A tqdm on stderr, if that is a terminal; the time left is that of the average so far, not of the last steps."""

    quiet = False
    """No bar at all: `modiff --quiet`."""

    def __init__(
        self, iterable: Iterable[Any] | None = None, *, total: float | None = None, initial: int = 0,
        desc: str | None = None, unit: str = "it", bar_format: str | None = None, shown: bool = True,
    ) -> None:  # fmt: skip
        disable = None if shown and not Bar.quiet else True
        super().__init__(iterable, desc, total, initial=initial, unit=unit, bar_format=bar_format, file=sys.stderr,
                         disable=disable, dynamic_ncols=True, smoothing=0, mininterval=0.5)  # fmt: skip
