"""The table of anchors: every row from the same noise, the paper's form worst, int8 codes near the exact weights."""

from __future__ import annotations

import json

import anchors


def test_it_prints_and_keeps_a_row_for_each_way_to_anchor(tmp_path, capsys):
    file = tmp_path / "anchors.json"
    anchors.main(["--quick", "--steps", "5", "--num-images", "1", "--json", str(file)])
    kept = json.loads(file.read_text())
    paper, exact, int8 = kept["rows"]
    assert [row["anchor"] for row in kept["rows"]] == list(anchors.QUICK)
    assert exact["W4A8"] < 0.5 * paper["W4A8"]
    assert int8["W4A8"] < 1.3 * exact["W4A8"]
    assert (kept["settings"]["steps"], kept["settings"]["num_images"]) == (5, 1)
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| anchored with | W8A8 | W8A4 | W4A8 |"
    assert len(table) == 2 + len(anchors.QUICK)
