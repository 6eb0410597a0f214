"""Less memory for states: less of it with each share, all rows printed and kept."""

import json

import state_memory


def test_it_prints_and_keeps_a_row_for_each_budget_and_each_grid(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(state_memory, "SHARES", (1.0, 0.0))
    run = state_memory.calibration_run
    monkeypatch.setattr(state_memory, "calibration_run", lambda pipe, steps, batch: run(pipe, steps=3, batch=batch))
    file = tmp_path / "states.json"
    state_memory.main(["--num-images", "1", "--rounds", "1", "--json", str(file)])
    written = json.loads(file.read_text())
    assert [(row["config"], row["share"], row["mib"] > 0) for row in written["budgets"][::2]] == [
        ("w8a8", 1.0, True), ("w8a8", 0.0, False), ("w8a4", 1.0, True), ("w8a4", 0.0, False)
    ]  # fmt: skip
    assert all(0 < row["low"] == row["error_ratio"] for row in written["int16"])
    assert capsys.readouterr().out.count("\n| ") == 8 + 3 + 1
