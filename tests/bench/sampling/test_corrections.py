"""The table of corrections: a row for each pair of bits and mode, run once and kept."""

import json
import sys

from bench.sampling import corrections
from tests.pixels import saved_pipeline


def test_rows_are_run_once_and_hold_what_each_table_gives(tmp_path, monkeypatch, capsys):
    model, work, figures = saved_pipeline(tmp_path / "pipeline"), tmp_path / "work", tmp_path / "rows.json"
    monkeypatch.setattr(corrections, "BITS", ((4, 4),))
    words = ["--num-images", "2", "--pairs", "2", "--batch", "2", "--steps", "3", "--slope", "positive"]
    words += ["--model", str(model), "--work", str(work), "--json", str(figures)]
    monkeypatch.setattr(sys, "argv", ["corrections.py", *words])
    corrections.main()
    table = capsys.readouterr().out
    rows = {path.stem: json.loads(path.read_text()) for path in work.glob("w*.json")}
    assert set(rows) == {"w4a4-plain", "w4a4-exact", "w4a4-quantized"}
    for row in rows.values():
        assert 0 < min(row["minmax"], row["ptqd"], row["tac"])
        assert len({row["minmax"], row["ptqd"], row["tac"]}) == 3
        assert len(row["tac_steps"]["K"]) == len(row["ptqd_steps"]["k"]) == 3
        assert row["median_k"] == sorted(row["ptqd_steps"]["k"])[1]
        assert row["median_K_minus_1"] == sorted(abs(k - 1) for k in row["tac_steps"]["K"])[1]
    assert min(rows["w4a4-plain"]["ptqd_steps"]["k"]) == 0, "it is negative with --slope any"
    monkeypatch.setattr(corrections, "run_row", None)
    corrections.main()
    assert capsys.readouterr().out == table
    written = json.loads(figures.read_text())
    assert (written["settings"]["pairs"], written["rows"]) == (
        2,
        [rows[f"w4a4-{m.split()[0]}"] for m in corrections.MODES],
    )
