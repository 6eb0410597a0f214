"""The benchmark of norms runs both ways on the same input, and they agree."""

import pytest

import norms
from tests.helpers import assert_within

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.mark.parametrize("case", norms.QUICK, ids=lambda case: case.norm)
def test_both_ways_compute_the_same(case):
    x, gate = norms.input_of(case)
    fusion, apart = norms.fusion_of(case, gate)
    assert_within(fusion.compute(x), apart(x), 1e-4)


def test_it_prints_a_row_for_each_case(capsys):
    rows = norms.main(["--quick", "--rounds", "1"])
    assert capsys.readouterr().out.count("in the minima") == len(rows) == 2 * len(norms.QUICK)
