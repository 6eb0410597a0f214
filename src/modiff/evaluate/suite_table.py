"""The rows of an evaluation as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from modiff.evaluate.suite_metrics import Measurement

COLUMNS = (
    ("fd_to_reference", "FD to reference", ".4g"),
    ("fd_to_full_precision", "FD to full precision", ".4g"),
    ("relative_l2", "rel. L2", ".4f"),
    ("psnr_db", "PSNR dB", ".1f"),
    ("gbops", "GBOPs", ".4g"),
    ("state_mib", "state MiB", ".2f"),
    ("seconds", "seconds", ".1f"),
)
FOOTNOTE = """\
FD: {metric} features, all seeds shared; intervals, notes and all other figures are in --json and --report.
Relative L2 and PSNR: 8-bit images against full precision. GBOPs and state: of one image. Bit-operations are not speed.
Seconds: all {n} images. Integers are simulated in floats, and slower, where a row does not say that it runs on them."""


def text_table(rows: Sequence[tuple[str, int, Sequence[Measurement]]]) -> str:
    """Name, steps and main figures of each configuration, aligned, with what the columns mean below."""
    found = [{m["name"]: m for m in metrics} for _, _, metrics in rows]
    shown = [column for column in COLUMNS if any(column[0] in metrics for metrics in found)]
    cells = [["", "steps", *(head for _, head, _ in shown)]]
    for (name, steps, _), metrics in zip(rows, found, strict=True):
        cells.append([name, str(steps), *(_cell(metrics.get(key), form) for key, _, form in shown)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]
    extractor = next((m["extractor"] for metrics in found for m in metrics.values() if m["extractor"]), "no")
    count = max(m["n"] for metrics in found for m in metrics.values())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", FOOTNOTE.format(metric=extractor, n=count)])


def _cell(metric: Measurement | None, form: str) -> str:
    return "-" if metric is None or metric["value"] is None else format(metric["value"], form)
