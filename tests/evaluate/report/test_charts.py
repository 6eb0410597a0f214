"""The figures of a report: fewer steps are in every chart of cost, points lie where they belong."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from modiff.evaluate.report import charts
from modiff.evaluate.report.charts import STEPS, Point, differences, draw_pareto, layer_figure, pareto

POINTS = [
    Point("50 steps", STEPS, 100.0, 0.0),
    Point("25 steps", STEPS, 50.0, 0.1, 0.05, 0.2),
    Point("12 steps", STEPS, 24.0, 0.3),
    Point("W8A4", "plain", 5.0, 0.8, 0.0, 0.9),
    Point("W8A4", "modulated", 6.0, 0.02),
    Point("W8A2", "modulated", 4.0, None),
    Point("my $config$", "config", 5.5, 0.5),
]


def test_fewer_steps_are_a_dashed_line_through_their_points_in_a_file_that_is_the_same_each_time() -> None:
    first, second = (pareto("cost", POINTS, cost="GBOPs", error="relative L2", caption="c") for _ in range(2))
    assert first.data == second.data
    drawing = Drawing()
    draw_pareto(drawing, POINTS, "GBOPs", "relative L2")
    lines = drawing.axes[0].get_lines()
    (line_of_steps,) = [line for line in lines if line.get_label() == "fewer sampler steps"]
    assert line_of_steps.get_linestyle() == "--"
    assert list(zip(*map(list, line_of_steps.get_data()), strict=True)) == [(24.0, 0.3), (50.0, 0.1)]
    (full,) = [line for line in lines if line.get_label() == "50 steps (error 0)"]
    assert list(full.get_xdata()) == [100.0, 100.0]


def test_the_map_has_a_row_for_each_layer_and_a_column_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Axes] = []
    real = charts.layer_map
    monkeypatch.setattr(charts, "layer_map", lambda axis, *rest: (seen.append(axis), real(axis, *rest)))
    layers = [
        {"name": f"block.{i}", "call": i, "steps": [{"step": t, "output_relative_l2": e} for t, e in enumerate(line)]}
        for i, line in enumerate(([0.0, 0.1, 0.01], [0.0, 1e-9, 0.5]))
    ]
    figure = layer_figure(layers, "c")
    values = seen[0].images[0].get_array()
    assert values.shape == (2, 3)
    assert values.filled(99).tolist()[0][1:] == pytest.approx([-1, -2])
    assert values.mask.tolist() == [[True, False, False], [True, True, False]]
    assert [label.get_text() for label in seen[0].get_yticklabels()] == ["block.0", "block.1 (call 2)"]
    assert "2 layers over 3 steps. The largest is at block.1: 0.5" in figure.alt


FULL = np.full((10, 64, 64, 1), 100, np.uint8)


def test_brighter_is_red_darker_is_blue_equal_is_white() -> None:
    images = FULL[:1].copy()
    images[0, 0, 0], images[0, 0, 1], images[0, 0, 2] = 110, 84, 228
    colours = differences(images, FULL[:1])
    assert colours[0, 0, 0] == pytest.approx([1, 1 - 80 / 255, 1 - 80 / 255])
    assert colours[0, 0, 1] == pytest.approx([1 - 128 / 255, 1 - 128 / 255, 1])
    assert colours[0, 0, 2] == pytest.approx([1, 0, 0])
    assert (colours[0, 1:] == 1).all()
