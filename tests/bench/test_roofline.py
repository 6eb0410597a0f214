"""The least time of a layer, from numbers alone."""

import pytest

from roofline import Reached, bytes_moved, roofline_seconds

MACHINE = Reached(bytes_per_second=10.0, float_operations=100.0, integer_operations=400.0)


@pytest.mark.parametrize(
    ("work", "dynamic", "itemsize", "expected"),
    [
        ("float", True, 4, 4 * (6 + 5 + 3)),
        ("float", True, 2, 2 * (6 + 5 + 3)),
        ("matmul", True, 4, 6 + 5 + 8 * 3),
        ("plain", True, 4, 2 * 4 * 6 + 6 + (6 + 5) + 4 * 3),  # x for the scale, x for the codes, codes; matmul; output
        ("plain", False, 2, 2 * 6 + 6 + (6 + 5) + 2 * 3),
        ("modulated", False, 4, (4 + 4 + 4 + 1) * 6 + (6 + 5) + (4 + 4 + 4 + 4) * 3),
        ("modulated", True, 2, (2 * (2 + 4) + 4 + 1) * 6 + (6 + 5) + (4 + 4 + 4 + 2) * 3),
    ],
)
def test_bytes_are_those_of_each_stage_reading_and_writing_once(work, dynamic, itemsize, expected):
    assert bytes_moved(work, 6, 5, 3, dynamic=dynamic, itemsize=itemsize) == expected


def test_the_slower_of_memory_and_arithmetic_decides():
    assert roofline_seconds(20, 100, MACHINE, integer=False) == 2.0
    assert roofline_seconds(20, 1000, MACHINE, integer=False) == 10.0
    assert roofline_seconds(20, 1000, MACHINE, integer=True) == 2.5
