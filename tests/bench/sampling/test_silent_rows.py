"""Silent rows: counted by codes, more of them with a dead zone, and nothing of it stays behind."""

import json
from collections import Counter

import pytest
import torch

from modiff.config import QuantizerConfig
from modiff.core.quantizer import Quantizer
from sampling import silent_rows


def test_a_dead_zone_drops_what_is_small_and_rows_are_counted_along_the_channels() -> None:
    quantizer = Quantizer(QuantizerConfig(bits=3), "tensor", -1, (2,))
    residual = torch.tensor([[3.0, 0.0], [0.7, 0.0], [0.2, 0.1]])  # the scale is 1
    plain, counts = quantizer(residual), Counter[str]()
    with silent_rows.dead_zone(0.75, counts):
        code = quantizer(residual)
    assert code is not None
    assert plain is not None
    assert code.value().tolist() == [[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert plain.value().tolist() == [[3.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    assert counts == {"tokens": 3, "silent tokens": 2, "codes": 6, "silent codes": 5, "layers": 1, "silent layers": 0}
    assert torch.equal(quantizer(residual).value(), plain.value())


@pytest.mark.parametrize("model", silent_rows.MODELS)
def test_it_prints_and_keeps_a_row_for_each_width_and_dead_zone(model, tmp_path, capsys) -> None:
    file = tmp_path / "rows.json"
    silent_rows.main(["--model", model, "--steps", "4", "--num-images", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    shares = {(row["bits"], row["dead_zone"]): row["silent"]["codes"] for row in rows}
    assert shares[4, 0.5] < shares[4, 1.0] < shares[2, 1.0] <= 1
    assert (rows[-1]["silent"]["pixels"] > 0) == (model == "embedded")
    assert rows[0]["relative_l2"] == pytest.approx(min(row["relative_l2"] for row in rows))
    assert capsys.readouterr().out.count("\n| ") == len(rows)
