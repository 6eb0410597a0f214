"""Tables hold what the rows say, and sentences what the figures say."""

import doctest

import numpy as np
import pytest

from experiments import registry, words
from experiments.charts import Line, line_chart
from experiments.paper import zero_bits
from experiments.tables import crossed, listing
from experiments.words import between, error, find, less, number, times
from modiff.evaluate.report.document import Cell

ROWS = [
    {"mode": "plain", "bits": 8, "relative_l2": 0.25, "low": 0.2, "high": 0.3, "psnr_db": 12.04},
    {"mode": "plain", "bits": 4, "relative_l2": None, "low": None, "high": None, "psnr_db": None},
    {"mode": "modulated", "bits": 8, "relative_l2": 0.0, "low": 0.0, "high": 0.0, "psnr_db": None},
]


def test_a_crossed_table_has_a_place_for_each_pair_and_leaves_gaps_empty() -> None:
    table = crossed("x", "Caption.", ROWS, down=("bits", "bits"), across="mode", titles={"plain": "Plain"})
    assert [c.title for c in table.columns] == ["bits", "Plain", "modulated"]
    assert table.rows == (
        (Cell("8", 8.0), Cell("0.2500", 0.25, "12.0 dB"), Cell("0.0000", 0.0)),
        (Cell("4", 4.0), Cell("diverged"), Cell("")),
    )
    named = crossed("x", "Caption.", ROWS, down=("mode", "mode"), across="bits")
    assert not named.columns[0].numeric
    assert named.rows[0][0] == Cell("plain", None)


def test_a_listing_has_a_line_for_each_row_with_intervals() -> None:
    columns = [("mode", "mode", ""), ("bits", "bits", "d"), ("relative_l2", "error", "l2"), ("gbops", "GBOPs", ".1f")]
    table = listing("x", "Caption.", ROWS, columns)
    assert table.rows[0] == (
        Cell("plain"), Cell("8", 8.0), Cell("0.2500", 0.25, "[0.2000, 0.3000]"), Cell("-")
    )  # fmt: skip
    assert table.rows[1][2] == Cell("diverged")
    assert [c.numeric for c in table.columns] == [False, True, True, True]


def test_words_of_figures_and_of_none() -> None:
    assert find(ROWS, mode="plain", bits=4) is ROWS[1]
    assert find(ROWS, mode="tuned") == {}
    assert (error(ROWS[0]), error(ROWS[1]), error({})) == (0.25, None, None)
    assert (number(0.12345), number(None)) == ("0.123", "no figure")
    assert (times(3.0, 2.0), times(1.0, 0.0), times(1000.0, 2.0)) == ("1.5", "an unknown number of", "500")
    assert (less(0.5, 1.0), less(1.0, 0.5), less(0.0, 1.0)) == ("2 times less", "2 times more", "not to be compared")
    assert (between([0.5, None, 0.25]), between([None])) == ("0.25 to 0.5", "no figure")
    assert between([0.101, 0.1], ".0%") == "10%"


def test_the_error_of_fewer_steps_is_read_between_runs_only() -> None:
    curve = [(0.5, 0.01), (1.0, 0.0), (0.25, 0.04)]
    assert zero_bits.at_share(curve, 0.5) == pytest.approx(0.01)
    assert zero_bits.at_share(curve, 0.25) == pytest.approx(0.04)
    assert zero_bits.at_share(curve, 0.5**1.5) == pytest.approx(0.02)  # a straight line in logs
    assert zero_bits.at_share(curve, 0.9) == pytest.approx(0.002)
    assert zero_bits.at_share(curve, 0.2) is None
    assert zero_bits.at_share(curve, 1.1) is None
    assert zero_bits.at_share([], 0.5) is None


@pytest.mark.parametrize("module", [words, zero_bits, registry])
def test_the_examples_in_the_docstrings_hold(module: object) -> None:
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)


def picture(data: bytes) -> np.ndarray:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("L"))


def chart(lines: list[Line], **options: bool):
    return line_chart("a-name", lines, title="T", x="bits", y="error", caption="Caption.", **options)


def test_a_chart_says_what_it_shows_and_draws_what_changes() -> None:
    a = Line(label="plain", x=[8, 4, 2], y=[0.1, 0.2, None])
    b = Line(label="flat", level=0.15, dashed=True)
    both = chart([a, b])
    assert both.alt == "error over bits. plain: 0.2 at 4, 0.1 at 8; flat: 0.15 throughout."
    assert (both.name, both.caption, both.half) == ("a-name", "Caption.", False)
    pictures = [picture(c.data) for c in (both, chart([a]), chart([a, b], falling=True), chart([a, b], log_x=True))]
    assert all(min(p.shape) > 300 and 0.005 < (p < 250).mean() < 0.9 for p in pictures)
    shapes = {p.shape for p in pictures}
    assert len({p.tobytes() for p in pictures}) == 4
    assert len(shapes) <= 2
    assert chart([a, b]).data == both.data


def test_a_chart_of_nothing_is_still_a_picture() -> None:
    empty = chart([Line(label="plain", x=[8], y=[None]), Line(label="zero", x=[8], y=[0.0])])
    assert "plain: no figures" in empty.alt
    assert min(picture(empty.data).shape) > 300
