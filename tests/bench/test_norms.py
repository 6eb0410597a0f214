"""The benchmark of norms runs both ways on the same input, and they agree."""

from __future__ import annotations

import json

import pytest

import norms
from tests.helpers import assert_within

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def test_it_prints_and_keeps_a_row_for_each_case(tmp_path, capsys):
    file = tmp_path / "norms.jsonl"
    rows = norms.main(["--quick", "--rounds", "1", "--json", str(file)])
    assert len(rows) == 2 * len(norms.QUICK)
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["name"] for row in kept] == [row["name"] for row in rows]
    assert all(set(row["seconds_min"]) == {"apart", "fused"} for row in kept)
    assert capsys.readouterr().out.count("in the minima") == len(rows)


@pytest.mark.parametrize("case", norms.QUICK, ids=lambda case: case.norm)
def test_both_ways_compute_the_same(case):
    x, gate = norms.input_of(case)
    fusion, apart = norms.fusion_of(case, gate)
    assert_within(fusion.compute(x), apart(x), 1e-4)
