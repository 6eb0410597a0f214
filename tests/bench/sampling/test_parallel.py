"""The table of parallel sampling: full precision and W8A4, one after the other and in a window."""

import json

from sampling import parallel


def test_a_row_for_each_config_and_window(tmp_path, capsys) -> None:
    file = tmp_path / "parallel.json"
    parallel.main(["--quick", "--steps", "6", "--num-images", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    exact, fast, modulated, along, by_row = rows
    assert [row["parallel"] for row in rows] == [1, 5, 1, 5, 5]
    assert (exact["relative_l2"], exact["iterations"]) == (0, 6)
    assert fast["iterations"] < 6 <= fast["evaluations"]
    assert 0 < along["to_parallel"] < by_row["to_parallel"] < 0.4
    assert modulated["residual"] == 1
    assert 0 < along["residual"] < along["residual_95"] < 3
    assert capsys.readouterr().out.count("\n| ") == 5
