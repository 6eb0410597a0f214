"""The table of anchors: every row from the same noise, the paper's form worst, int8 codes near the exact weights."""

import json

import anchors


def test_it_prints_and_keeps_a_row_for_each_way_to_anchor(tmp_path, capsys):
    file = tmp_path / "anchors.json"
    anchors.main(["--quick", "--steps", "5", "--num-images", "1", "--json", str(file)])
    paper, exact, int8 = json.loads(file.read_text())["rows"]
    assert [row["anchor"] for row in (paper, exact, int8)] == list(anchors.QUICK)
    assert exact["W4A8"] < 0.5 * paper["W4A8"]
    assert int8["W4A8"] < 1.3 * exact["W4A8"]
    assert capsys.readouterr().out.count("\n| ") == len(anchors.QUICK)
