"""The drawn figures: fewer steps are in every chart of cost, points lie where they belong, names are shown as typed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.figure import Figure as Drawing

from modiff.errors import ConfigError
from modiff.evaluate.report import charts
from modiff.evaluate.report.charts import STEPS, Point, layer_map, pareto
from modiff.evaluate.report.document import Figure

POINTS = [
    Point("50 steps", STEPS, 100.0, 0.0),
    Point("25 steps", STEPS, 50.0, 0.1, 0.05, 0.2),
    Point("12 steps", STEPS, 24.0, 0.3),
    Point("W8A4", "plain", 5.0, 0.8, 0.0, 0.9),
    Point("W8A4", "modulated", 6.0, 0.02),
    Point("W8A2", "modulated", 4.0, None),
    Point("my $config$", "config", 5.5, 0.5),
]


def drawn(points: list[Point], monkeypatch: pytest.MonkeyPatch) -> Drawing:
    """The drawing behind the file."""
    seen: list[Drawing] = []
    real = charts._draw_pareto

    def keep(drawing: Drawing, *rest: object) -> None:
        seen.append(drawing)
        real(drawing, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(charts, "_draw_pareto", keep)
    chart(points)
    return seen[0]


def chart(points: list[Point]) -> Figure:
    return pareto("cost", points, cost="GBOPs", error="relative L2", caption="c")


def step(number: int, error: float) -> dict[str, float]:
    return {"step": number, "output_relative_l2": error}


def layers(*errors: list[float]) -> list[dict[str, object]]:
    return [
        {"name": f"block.{i}", "call": i % 2, "steps": [step(t, e) for t, e in enumerate(line)]}
        for i, line in enumerate(errors)
    ]


def test_fewer_steps_are_a_dashed_line_through_their_points(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(POINTS, monkeypatch).axes[0].get_lines()
    (found,) = [line for line in lines if line.get_label() == "fewer sampler steps"]
    assert found.get_linestyle() == "--"
    assert list(zip(*map(list, found.get_data()), strict=True)) == [(24.0, 0.3), (50.0, 0.1)]
    (full,) = [line for line in lines if line.get_label() == "50 steps (error 0)"]
    assert list(full.get_xdata()) == [100.0, 100.0]


def test_each_family_has_its_points_and_what_diverged_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {line.get_label(): list(line.get_xdata()) for line in drawn(POINTS, monkeypatch).axes[0].get_lines()}
    assert (lines["plain"], lines["modulated"], lines["config"]) == ([5.0], [6.0], [5.5])


@pytest.mark.parametrize("points", [[], POINTS[:1], POINTS[3:], [POINTS[0], *POINTS[3:]]])
def test_a_chart_without_fewer_steps_is_an_error(points: list[Point]) -> None:
    with pytest.raises(ConfigError, match="expected a run with fewer sampler steps"):
        chart(points)


def test_the_alt_text_says_every_point() -> None:
    alt = chart(POINTS).alt
    for part in ("25 steps costs 50, error 0.1", "modulated W8A4 costs 6, error 0.02", "W8A2 costs 4, not finite"):
        assert part in alt


def test_it_is_an_svg_file_that_is_the_same_each_time() -> None:
    first, second = chart(POINTS), chart(POINTS)
    assert first.data == second.data
    root = ElementTree.fromstring(first.data)
    assert root.tag.endswith("svg")
    assert not re.search(rb'href="(?!#)', first.data)


def test_names_with_dollars_are_shown_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text.get_text() for text in drawn(POINTS, monkeypatch).axes[0].texts]
    assert r"my \$config\$" in texts


def test_the_map_has_a_row_for_each_layer_and_a_column_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Drawing] = []
    real = charts._draw_layers
    monkeypatch.setattr(charts, "_draw_layers", lambda drawing, *rest: (seen.append(drawing), real(drawing, *rest)))
    figure = layer_map(layers([0.0, 0.1, 0.01], [0.0, 1e-9, 0.5]), "c")  # type: ignore[arg-type]
    values = seen[0].axes[0].images[0].get_array()
    assert values.shape == (2, 3)
    assert values.filled(99).tolist()[0][1:] == pytest.approx([-1, -2])
    assert values.mask.tolist() == [[True, False, False], [True, True, False]]
    assert [label.get_text() for label in seen[0].axes[0].get_yticklabels()] == ["block.0", "block.1 (call 2)"]
    assert "2 layers over 3 steps. The largest is at block.1: 0.5" in figure.alt


def test_a_layer_that_ran_at_some_steps_only_keeps_its_columns() -> None:
    traces = layers([0.1, 0.2, 0.3], [0.1])
    traces[1]["steps"] = [step(2, 0.4)]
    assert layer_map(traces, "c").alt.startswith("Heat map of the relative error of 2 layers over 3 steps")  # type: ignore[arg-type]
