"""The table of docs/demo.md from the JSON of a demo: python tools/demo_table.py docs/results/demo.json"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = "| | steps | relative L2 | PSNR dB | GBOPs | state MiB | seconds |\n|---|--:|--:|--:|--:|--:|--:|"


def number(value: float | None, form: str) -> str:
    """A figure, or a dash where it has no meaning."""
    return "-" if value is None else format(value, form)


def line(row: dict[str, Any]) -> str:
    """One row in Markdown."""
    cells = [
        row["name"],
        str(row["steps"]),
        number(row["relative_l2"], ".4f"),
        number(row["psnr_db"], ".1f"),
        number(row["gbops"], ",.0f"),
        number(row["state_mib"], ".1f"),
        number(row["seconds"], ".1f"),
    ]
    return f"| {' | '.join(cells)} |"


def table(result: dict[str, Any]) -> str:
    """All rows in Markdown."""
    return "\n".join([HEAD, *map(line, result["rows"])])


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
