"""The table of corrections: a row for each pair of bits and mode, run once and kept."""

import json
import sys

from bench.sampling import corrections
from tests.pixels import saved_pipeline


def test_rows_are_run_once_and_hold_what_each_table_gives(tmp_path, monkeypatch, capsys):
    model, work = saved_pipeline(tmp_path / "pipeline"), tmp_path / "work"
    monkeypatch.setattr(corrections, "BITS", ((4, 8),))
    sizes = ["--num-images", "2", "--pairs", "2", "--batch", "2", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["corrections.py", "--model", str(model), "--work", str(work), *sizes])
    corrections.main()
    table = capsys.readouterr().out
    rows = {path.stem: json.loads(path.read_text()) for path in work.glob("w*.json")}
    assert set(rows) == {"w4a8-plain", "w4a8-exact", "w4a8-quantized"}
    for row in rows.values():
        assert 0 < min(row["minmax"], row["ptqd"], row["tac"])
        assert len({row["minmax"], row["ptqd"], row["tac"]}) == 3
        assert len(row["tac_steps"]["K"]) == len(row["ptqd_steps"]["k"]) == 3
    monkeypatch.setattr(corrections, "run_row", None)
    corrections.main()
    assert capsys.readouterr().out == table
