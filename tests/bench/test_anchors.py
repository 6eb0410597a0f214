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


def test_modulated_is_compared_with_plain_on_samplers_and_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    file = tmp_path / "samplers.json"
    monkeypatch.setattr(anchors, "BITS", {})
    options = ["--num-images", "2", "--json", str(file), "--samplers"]
    anchors.main([*options, "lcm4"])
    first = json.loads(file.read_text())["rows"]
    assert [(row["bits"], row["scales"]) for row in first] == [("W4A4", "static"), ("W4A4", "dynamic")]
    assert all(0 < error < 2 for row in first for how in ("plain", "modulated") for error in row[how])
    anchors.main([*options, "lcm4,consistency8"])
    rows = json.loads(file.read_text())["rows"]
    assert (rows[:2], len(rows)) == (first, 4)
    assert capsys.readouterr().out.count("\n| lcm4 | W4A4 | static | ") == 2
