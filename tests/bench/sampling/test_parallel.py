"""The table of parallel sampling: full precision and W8A4, one after the other and in a window."""

import json

import pytest
import torch

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
    assert 0 < along["residual_95_all"] < 3
    assert capsys.readouterr().out.count("\n| ") == 5


@pytest.mark.parametrize(
    ("parts", "residuals"), [(1, [2.0, 3.0, 2.0, 3.0]), (2, [2.0, 2.0, 3.0, 3.0])], ids=["two readers", "a split input"]
)
def test_residuals_belong_to_the_row_that_they_were_quantized_in(parts: int, residuals: list[float]) -> None:
    sizes = parallel.Sizes([980.0, 960.0, 940.0], parts)
    for scale in (2.0, 1.0):
        for residual in residuals:
            sizes.observe(torch.full((4,), scale * residual))
        sizes.end_call()
    assert sizes.calls == {960.0: [16.0, 4.0], 940.0: [36.0, 9.0]}
    squares, before = {("layer", t): calls for t, calls in sizes.calls.items()}, {("layer", 960.0): [4.0]}
    assert parallel.ratios(squares, before, last=True) == (1.0, 1.0)
    assert parallel.ratios(squares, before, last=False)[0] == 10**0.5 / 2
