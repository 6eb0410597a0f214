"""The loop benchmark's command: every variant has a row, rows tell their rounds, and limits are honest."""

import json
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import denoising_loop
from loop import report as loop_report
from loop.models import MODELS
from loop.rounds import Record
from loop.task import Task
from modiff import ConfigError
from tests.drawings import assert_names_are_apart, undrawn


def test_the_command_runs_a_variant_in_its_process_prints_it_and_appends_a_row(tmp_path, capsys, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"variant": "an older row"}\n')
    arguments = ["--models", "tiny", "--quick", "--threads", "1", "--variants", "fp32-eager"]
    monkeypatch.setattr(sys, "argv", ["denoising_loop.py", *arguments, "--json", str(file)])
    denoising_loop.main()
    _, row = (json.loads(line) for line in file.read_text().splitlines())
    assert tuple(row) == loop_report.FIELDS
    assert (row["model"], row["variant"], row["relative_l2"], row["state_mib"]) == ("tiny", "fp32-eager", 0, 0)
    assert row["threads"] == 1
    assert 0 < row["seconds_min"] <= row["seconds_median"]
    assert 50 < row["peak_mib"] < 4000
    assert row["command"].endswith("--json rows.jsonl  # tiny: random weights (speed only), batch 2, 6 of 10 steps")
    assert str(tmp_path) not in row["command"]
    assert "relative L2 says nothing about trained weights" in capsys.readouterr().out
    (plot,) = tmp_path.glob("rows-tiny-*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_figures_of_a_row_are_of_its_rounds():
    record: Any = Record(Task(MODELS["embedded"], "gated", timed=50))
    record.facts = {"isa": "amx", "threads": 2, "note": ""}
    for seconds, peak in ((3.0, 90.0), (1.0, 70.0), (2.5, 80.0)):
        found = {"seconds": seconds, "steps": [0.5, 0.1, 0.3, 0.2], "images": np.full(4, 3.0), "state_mib": 5.0}
        record.rounds.append({**found, "peak_mib": peak})
        record.waves.append(0)
    head = {"commit": "c", "machine": "m", "command": "x"}
    row: Any = loop_report.row_of(record, np.full(4, 4.0), head)
    assert [row[k] for k in ("seconds_min", "seconds_median", "peak_mib", "state_mib")] == [1.0, 2.5, 90.0, 5.0]
    assert (row["relative_l2"], row["command"]) == (0.25, "x  # embedded: batch 16, 50 of 50 steps")
    assert (row["seconds_first"], row["seconds_step"]) == (0.5, 0.2)
    assert loop_report.error_of(np.array([np.nan]), np.ones(1)) is None
    record.rounds, record.waves, record.reason = [], [], "no such thing here"
    assert loop_report.row_of(record, None, head) is None
    assert "gated                not run: no such thing here" in loop_report.table([record], {})


LOOPS = {"fp32-eager": (2.5, 0.0), "fp32-compiled": (2.1, 9e-7), "bf16-compiled": (1.31, 0.0102),
         "modulated-w8a8": (1.4, 0.0114), "modulated-w8a7": (1.41, 0.0106), "torchao-int8": (1.36, 0.0106),
         "fewer-steps-2": (0.64, 0.0566), "deepcache-2": (0.94, 0.0426), "gated": (9.0, None)}  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, len(LOOPS) - 1, len(LOOPS)])
def test_the_plot_names_each_variant_apart_from_others_and_draws_all_that_its_legend_names(count: int):
    rows = [{"variant": name, "seconds_min": s, "relative_l2": e} for name, (s, e) in [*LOOPS.items()][:count]]
    drawing = Figure(layout="constrained")
    loop_report.draw(drawing, rows, "a title of the machine, its processor, torch and threads, " * 3)
    (axes,) = drawing.axes
    floor = loop_report.FLOOR
    assert_names_are_apart(axes, {r["variant"]: (r["seconds_min"], max(r["relative_l2"] or 0, floor)) for r in rows})
    assert undrawn(axes) == []
    assert (count > 2) == any("nothing is faster" in str(line.get_label()) for line in axes.get_lines())
    title = axes.title.get_window_extent()
    assert drawing.bbox.x0 <= title.x0 < title.x1 <= drawing.bbox.x1


def test_less_instructions_than_asked_for_are_refused():
    amx = {"amx_int8": True, "avx512_vnni": True, "avx512_f": True, "avx512_bw": True, "avx2": True, "sse4_1": True}
    assert denoising_loop.child_environment("native", None, amx) == {}
    assert denoising_loop.child_environment("vnni", 1, amx) == {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "ATEN_CPU_CAPABILITY": "avx512",
    }
    with pytest.raises(ConfigError, match=r"--isa vnni: expected .* AVX-512 VNNI, got one that reaches avx512\. "):
        denoising_loop.child_environment("vnni", None, {**amx, "avx512_vnni": False})


def test_the_line_of_the_plot_joins_what_no_other_variant_beats_in_time_and_error() -> None:
    points = [(2.0, 0.3), (1.0, 0.5), (3.0, 0.3), (1.0, 0.6), (4.0, 0.1), (5.0, 0.2)]
    assert loop_report.pareto(points) == [(1.0, 0.5), (2.0, 0.3), (4.0, 0.1)]
