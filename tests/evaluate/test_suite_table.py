"""The table for a terminal: aligned, only columns that there are, dashes for what is not."""

from __future__ import annotations

from modiff.evaluate.suite_metrics import Measurement
from modiff.evaluate.suite_table import text_table


def measured(name: str, value: float | None, n: int = 500, extractor: str | None = None) -> Measurement:
    return {"name": name, "label": name, "extractor": extractor, "value": value, "n": n, "low": None, "high": None,
            "note": ""}  # fmt: skip


def test_the_table_as_it_is_printed() -> None:
    rows = [
        ("full precision", 50, [measured("gbops", 1234.5, 1), measured("seconds", 61.26)]),
        ("plain", 50, [measured("gbops", 0.5, 1), measured("relative_l2", 0.1), measured("psnr_db", None),
                       measured("fd_to_full_precision", 0.25, extractor="mine"), measured("unknown", 1.0)]),
    ]  # fmt: skip
    assert text_table(rows).splitlines()[:4] == [
        "                steps  FD to full precision  rel. L2  PSNR dB  GBOPs  seconds",
        "-----------------------------------------------------------------------------",
        "full precision     50                     -        -        -   1234     61.3",
        "plain              50                  0.25   0.1000        -    0.5        -",
    ]
    assert "mine features" in text_table(rows)
    assert "all 500 images" in text_table(rows)
