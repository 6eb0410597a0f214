"""The figures of docs/benchmarks.md: drawn from the committed rows, and the table says the same."""

from pathlib import Path

import pytest

import docs_figures

PAGE = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_table_of_the_page_is_what_the_rows_hold() -> None:
    for name, (speed, error) in docs_figures.speed_and_error(docs_figures.rows("loop.jsonl")).items():
        line = f"{speed:.2f}x | {error:.4f} |".replace("**", "")
        assert line in PAGE.replace("**", ""), name


def test_speeds_are_ratios_of_the_fastest_rounds() -> None:
    seconds = {"float32": [2.0, 3.0], "native W8A8": [1.0, 9.0], "native W8A4": [0.5, 0.6]}
    runs = [{"threads": n, "isa": isa, "seconds": {"a": seconds} if (n, isa) == (1, "avx2") else {}}
            for n in (2, 1) for isa in ("avx2", "avx2_vnni")]  # fmt: skip
    assert docs_figures.products(runs) == {"a": (2.0, 4.0)}


def test_the_front_holds_what_nothing_beats_in_speed_and_error_and_compiled_floats() -> None:
    points = {
        "fast": (3.0, 0.05),
        "exact": (1.5, 0.01),
        "beaten": (1.4, 0.02),
        "same speed": (3.0, 0.06),
        "slow": (0.9, 0.0),
    }
    assert docs_figures.unbeaten(points) == [(1.0, 0.0), (1.5, 0.01), (3.0, 0.05)]


@pytest.mark.parametrize("name", ["loop.jsonl", "products.jsonl"])
def test_both_figures_are_drawn(name: str) -> None:
    rows = docs_figures.rows(name)
    if name == "loop.jsonl":
        figure = docs_figures.draw_loops(docs_figures.speed_and_error(rows))
        assert len(figure.axes[0].texts) == len(docs_figures.NAMES)
    else:
        figure = docs_figures.draw_products(docs_figures.products(rows))
        assert len(figure.axes[0].patches) == 24


def test_the_picture_of_the_index_has_a_row_for_each_setting_with_its_error() -> None:
    rows = docs_figures.images(count=1, steps=4)
    assert list(rows) == ["full precision", "half of the steps", "4 bits, plain", "4 bits, modiff"]
    assert all(made.shape == (1, 32, 32) for made in rows.values())
    labels = [axes.texts[0].get_text() for axes in docs_figures.draw_images(rows).axes]
    assert labels[0] == "full precision"
    assert [label.partition("\n")[2].partition(" L2")[0] for label in labels[1:]] == ["relative"] * 3
