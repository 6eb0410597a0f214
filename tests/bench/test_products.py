"""bench/products.py: the backends that it compares do the same work, and every variant gets its mean."""

import sys

import pytest
import torch

import products
from tests.helpers import assert_within


@pytest.mark.parametrize("size", [(2, 8, 6, 6), (2, 5, 24)])
def test_both_backends_make_the_same_output_of_the_same_codes(size, monkeypatch):
    made = []
    monkeypatch.setattr(products, "BITS", (4,))
    torch.manual_seed(0)
    runs = products.runs_of(size, 16)
    for name in ("native W8A4", "onednn W8A4"):
        made.append(runs[name]().clone())  # a step each: the second state holds the first one's sums too
    assert_within(made[1], 2 * made[0], 1e-3 * float(made[1].abs().max()))


def test_it_prints_a_line_for_each_shape_and_the_means(capsys, monkeypatch):
    monkeypatch.setattr(products, "SHAPES", {"one": ((1, 4, 5, 5), 8), "two": ((1, 3, 8), 8)})
    monkeypatch.setattr(sys, "argv", ["products", "--rounds", "1"])
    products.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["one", "two", "geometric", "geometric"]
    assert all(line.count("x") >= 1 + 3 * len(products.BITS) for line in lines[1:])
