"""Reports: charts, page and Markdown, a suite as their sections, and all of it in a real browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from PIL import Image

from modiff import presets
from modiff.evaluate.features.classifier import Classifier, ClassifierFeatures
from modiff.evaluate.pipelines import PipelineSource
from modiff.evaluate.report import charts
from modiff.evaluate.report.charts import COLUMNS, STEPS, Point, differences, draw_pareto, layer_figure, pareto
from modiff.evaluate.report.conclusion import conclusion
from modiff.evaluate.report.document import Cell, Column, Document, Figure, Section, Table, Verbatim
from modiff.evaluate.report.page import html_page, markdown, write_report
from modiff.evaluate.report.sections import suite_document
from modiff.evaluate.suite.plans import Plan, Preset
from modiff.evaluate.suite.run import Row, Suite, run_suite, watched_layers
from tests.browser import Browser, chromium, keep_screenshot
from tests.drawings import undrawn, whole_ticks
from tests.evaluate.fakes import FakeExtractor, FakeSource
from tests.pixels import pixel_pipeline

NASTY = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">"\'&|`*_[a](b) $x$'


def png(size: tuple[int, int] = (4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, format="PNG")
    return buffer.getvalue()


def table(name: str = "numbers") -> Table:
    """Sorted by value 1, 2, 10, none; by text 1, 10, 2."""
    columns = (Column("name", numeric=False), Column("value", note="What it is."), Column("other", note="What it is."))
    rows = (
        (Cell("b2"), Cell.number(10.0, ".0f", 9.0, 11.0), Cell.number(1.0)),
        (Cell("a"), Cell("-"), Cell.number(2.0)),
        (Cell("b10"), Cell.number(-2.0, ".0f"), Cell.number(3.0)),
        (Cell("c"), Cell.number(1.5, ".1f"), Cell("-")),
    )
    return Table(name, "Some numbers.", columns, rows)


def document(text: str = "plain") -> Document:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"><rect width="40" height="30"/></svg>'
    blocks = (
        text,
        Verbatim(f"modiff evaluate {text}"),
        Figure("dots", f"Dots {text}.", f"Caption {text}", png(), pixels=True, half=True),
        Figure("lines", "Lines.", "Lines", svg, "svg", half=True),
        table(),
        Table("texts", text, (Column(text, numeric=False, note=text),), ((Cell(text),),)),
    )
    return Document(f"Title {text}", f"Lead {text}", (Section(f"First {text}", blocks), Section("Second", ("End.",))))


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
    assert list(zip(*map(list, line_of_steps.get_data()), strict=True)) == [(24.0, 0.3), (50.0, 0.1), (100.0, 0.01)]
    assert drawing.axes[0].get_ylim()[0] < 0.01  # full precision, whose error is 0, at the lower edge
    assert undrawn(drawing.axes[0]) == []
    alone = Drawing()
    draw_pareto(alone, [POINTS[1], *CROWD], "GBOPs", "relative L2")  # no line goes through one point
    assert alone.axes[0].get_legend_handles_labels()[1] == ["plain"]


def test_the_map_has_a_row_for_each_layer_and_a_column_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Axes] = []
    real = charts.layer_map
    monkeypatch.setattr(charts, "layer_map", lambda axis, *rest, **more: seen.append(axis) or real(axis, *rest, **more))
    layers = [
        {"name": f"block.{i}", "call": i, "steps": [{"step": t, "output_relative_l2": e} for t, e in enumerate(line)]}
        for i, line in enumerate(([0.0, 0.1, 0.01], [0.0, 1e-9, 0.5]))
    ]
    figure = layer_figure(layers, "c")
    values = seen[0].images[0].get_array()
    assert values.shape == (2, 3)
    assert values.filled(99).tolist()[0][1:] == pytest.approx([-1, -2])
    assert values.mask.tolist() == [[True, False, False], [True, True, False]]
    assert whole_ticks(seen[0])
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


def test_nothing_is_loaded_from_elsewhere_and_texts_show_as_they_were_typed() -> None:
    page = html_page(document(NASTY))
    links = re.findall(r'<[^>]*?\s(?:src|href|data|srcset|action)="([^"]*)"', page)
    assert len(links) == 5
    assert all(link.startswith(("data:", "#section-")) for link in links)
    assert not re.search(r"url\(|@import|https?:", re.sub(r"data:[^\"]*", "", page).replace("&", ""))
    # title and its heading, lead, link and heading of a section, paragraph, code, 2 captions, head, cell, note;
    # as attributes a picture's text and a table's label
    assert page.count(html.escape(NASTY)) == 15
    assert NASTY not in page
    assert page.count("<script") == 1


def test_the_policy_allows_the_pages_own_script_and_style_and_no_other() -> None:
    page = html_page(document())
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() in policy
    assert not re.search(r"\son\w+=|\sstyle=", page)


def test_headings_paragraphs_figures_and_tables() -> None:
    text = markdown(document(), "pictures")
    assert text.startswith(
        "# Title plain\n\nLead plain\n\n## First plain\n\nplain\n\n```text\nmodiff evaluate plain\n```"
    )
    assert "![Dots plain.](pictures/dots.png)\n\nCaption plain" in text
    assert "![Lines.](pictures/lines.svg)" in text
    assert (
        "Some numbers.\n\n| name | value | other |\n|---|--:|--:|\n| b2 | 10 \\[9, 11\\] | 1 |\n| a | - | 2 |\n"
        "| b10 | -2 | 3 |\n| c | 1.5 | - |\n\nvalue, other: What it is."
    ) in text


def test_no_text_becomes_markup() -> None:
    text = markdown(document(NASTY))
    without_code = re.sub(r"^```text\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<" not in without_code
    bare = re.sub(r"\\.", "", re.sub(r"!\[[^\n]*\]\((figures/[\w.-]+)\)", "", without_code))
    assert not re.search(r"[`*\[\]$]", bare)
    rows = [line for line in without_code.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (2, 4) for row in rows)


def test_a_paragraph_stays_one() -> None:
    typed = ("- no list", "+ no list", "3. no list", "-3 is a number", "3.5 is one too", "# head", "two\n\nlines")
    text = markdown(Document("T", "L", (Section("S", typed),))).partition("## S\n\n")[2]
    shown = r"\- no list|\+ no list|3\. no list|-3 is a number|3.5 is one too|\# head|two lines"
    assert text.rstrip("\n").split("\n\n") == shown.split("|")


CHOSEN = Preset(num_images=10, steps=8, configs=("plain:8:4", "modulated:8:4"), fewer=(2, 4))
COMMAND = ["modiff", "evaluate", "my model"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("suite")
    np.save(folder / "real.npy", FakeSource(seed=50).images(None, 8, range(12)))
    return run_suite(
        FakeSource(seed=3, steps=8), FakeExtractor(), CHOSEN, folder / "run", reference=folder / "real.npy",
        batch_size=5, resamples=10, progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(suite: Suite) -> Document:
    return suite_document(suite, COMMAND)


def block(report: Document, name: str) -> Table:
    return next(b for s in report.sections for b in s.blocks if isinstance(b, Table) and b.name == name)


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_every_figure_of_every_configuration_is_in_the_long_table(suite: Suite, report: Document) -> None:
    lines = [(row[0].text, row[1].text, row[2].value, row[-1].text) for row in block(report, "figures").rows]
    assert Verbatim("modiff evaluate 'my model'") in report.sections[-2].blocks
    assert dict(texts(block(report, "environment")))["torch"] == suite.environment["torch"]
    assert lines == [(r.plan.name, m["label"], m["value"], m["note"]) for r in suite.rows for m in r.metrics]


def test_the_short_tables_have_each_configuration_once_and_its_own_figures(suite: Suite, report: Document) -> None:
    names = [row.plan.name for row in suite.rows]
    for name in ("paired", "costs", "as-sets", "to-reference"):
        assert [line[0] for line in texts(block(report, name))] == names
    paired = block(report, "paired")
    column = [c.title for c in paired.columns].index("relative L2")
    for row, cells in zip(suite.rows[1:], paired.rows[1:], strict=True):
        value = row.metric("relative_l2")["value"]
        assert (cells[column].value, cells[column].text) == (value, f"{value:.4f}")
    assert paired.rows[0][column].text == "-"


IMAGES = """return [...document.images].map((image) => {
  const box = image.getBoundingClientRect();
  return {id: image.closest("figure").id, natural: image.naturalWidth, width: box.width, height: box.height,
          right: box.right, alt: image.alt};
});"""
FITS = """const sizes = (query, side) =>
  [...document.querySelectorAll(query)].map((element) => element.getBoundingClientRect()[side]);
return {page: document.documentElement.scrollWidth, tables: sizes("table, td, th", "right"),
        broken: [...document.querySelectorAll("td.number")].filter((cell) => {
          const range = document.createRange();
          range.selectNodeContents(cell.firstChild);
          return range.getClientRects().length > 1;
        }).map((cell) => cell.textContent),
        pictures: sizes("img.pixels", "width"), conclusion: sizes("p.conclusion", "bottom")[0],
        rendering: [...document.querySelectorAll("img.pixels")].map((e) => getComputedStyle(e).imageRendering)};"""
SHOWN = """return [...document.querySelectorAll("table")].map((table) => table.closest("details")?.open ?? true)"""
NAMES = """return [...document.querySelectorAll('g[id^="name-"]')].map((name) => {
  const box = name.getBoundingClientRect();
  return [box.left, box.top, box.right, box.bottom];
});"""
COLUMN = """const table = document.getElementById(%s);
return [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);"""
PRESS = "document.getElementById('numbers').tHead.rows[0].cells[%d].querySelector('button').click();"
SORTED = "return [...document.getElementById('numbers').tHead.rows[0].cells].map((h) => h.getAttribute('aria-sort'));"
COLOURS = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor];"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as window:
        window.command("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        yield window


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Browser:
    """A small document."""
    browser.open(write_report(document(), tmp_path)[0])
    return browser


def names(browser: Browser, table: str = "numbers") -> list[str]:
    return browser.run(COLUMN % json.dumps(table))


def test_the_report_of_a_real_suite_shows_every_figure_and_logs_nothing(browser: Browser, tmp_path: Path) -> None:
    source = PipelineSource(pixel_pipeline())
    chosen = Preset(num_images=12, steps=4, configs=("plain:8:4", "modulated:8:4"))
    extractor = ClassifierFeatures(Classifier(channels=(4, 8), classes=3), "fashion-mnist-classifier")
    suite = run_suite(source, extractor, chosen, tmp_path / "run", batch_size=6, resamples=10, progress=False)
    values = [{m["name"]: m["value"] for m in row.metrics} for row in suite.rows]
    assert values[3]["relative_l2"] < values[2]["relative_l2"] < values[1]["relative_l2"]  # modulated, plain, fewer
    assert values[3]["state_mib"] > 0 == values[2]["state_mib"]
    assert values[1]["gbops"] * 2 == values[0]["gbops"]
    watched = watched_layers(source, [row.plan for row in suite.rows], 2)
    report = suite_document(suite, ["modiff", "evaluate"], watched=watched)
    browser.open(write_report(report, tmp_path / "report")[0])
    images = browser.run(IMAGES)
    assert [image["id"] for image in images] == [figure.name for figure in report.figures()]
    for image in images:
        assert image["natural"] > 0 < len(image["alt"]), image
        assert image["width"] > 100, image
        assert image["height"] > 20, image
        assert image["right"] <= 1280, image
    keep_screenshot(browser, "report")
    shown = browser.run(SHOWN)
    assert (shown[-1], set(shown[:-1])) == (False, {True})  # every figure of every configuration waits for a click
    browser.run("document.querySelector('summary').click();")
    assert set(browser.run(SHOWN)) == {True}
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    keep_screenshot(browser, "report-dark")
    browser.command("Emulation.setEmulatedMedia", features=[])
    browser.command("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    keep_screenshot(browser, "report-phone")
    phone = browser.run(FITS)
    browser.command("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    assert phone["page"] <= 390
    assert max(phone["tables"]) <= 390
    assert phone["broken"] == []  # no number stands on two lines
    assert set(phone["rendering"]) == {"pixelated"}
    assert min(phone["pictures"]) >= COLUMNS * 96
    assert phone["conclusion"] < 844
    assert browser.console() == []


CROWD = [Point(f"W8A{i} setting", "plain", 5.0 + i / 100, 0.1 + i / 1000) for i in range(12)]


@pytest.mark.parametrize("points", [POINTS, CROWD], ids=["apart", "crowded"])
def test_no_name_of_a_chart_lies_on_another_one(browser: Browser, tmp_path: Path, points: list[Point]) -> None:
    figure = pareto("cost", points, cost="GBOPs", error="relative L2", caption="c")
    (tmp_path / "chart.html").write_bytes(b"<!doctype html>" + figure.data[figure.data.index(b"<svg") :])
    browser.open(tmp_path / "chart.html")
    boxes = browser.run(NAMES)
    assert len(boxes) == sum(p.error is not None for p in points)
    for i, (left, top, right, bottom) in enumerate(boxes):
        for x0, y0, x1, y1 in boxes[:i]:
            assert left >= x1 or x0 >= right or top >= y1 or y0 >= bottom, i


def measured(low: float, value: float, high: float, name: str = "relative_l2") -> dict[str, Any]:
    return {"name": name, "label": name, "value": value, "low": low, "high": high, "n": 64, "note": ""}


def test_the_first_sentence_says_what_the_intervals_tell_apart_and_what_they_do_not() -> None:
    plans = [Plan(name="full precision", steps=8), Plan(name="half the steps", steps=4)]
    plans += [Plan(name=name, steps=8, config=presets.plain(8, 8), family="plain") for name in ("near", "same", "far")]
    intervals = [(0.1, 0.2, 0.3), (0.01, 0.02, 0.03), (0.25, 0.35, 0.45), (0.5, 0.6, 0.7)]
    rows = [Row(plans[0], ()), *(Row(p, (measured(*i),)) for p, i in zip(plans[1:], intervals, strict=True))]
    told = conclusion(SimpleNamespace(rows=rows, settings={"num_images": 64}))
    assert "against half the steps (relative L2 to full precision 0.2 [0.1, 0.3])" in told
    assert "near (0.02 [0.01, 0.03]) is closer" in told
    assert "same (0.35 [0.25, 0.45]) cannot be told apart from it" in told
    assert "far (0.6 [0.5, 0.7]) is further away" in told
    config = presets.plain(8, 8)
    config = dataclasses.replace(config, layer=dataclasses.replace(config.layer, execution="integer"))
    fast = Plan(name="fast", steps=8, config=config, family="plain")
    times = [measured(s, s, s, "seconds") for s in (2.0, 1.2, 1.5)]
    rows_timed = [Row(plan, (rows[1].metrics[0], m)) for plan, m in zip([*plans[:2], fast], times, strict=True)]
    timed = conclusion(SimpleNamespace(rows=rows_timed, settings={"num_images": 64}))
    assert timed.endswith("fast took 0.75 of full precision's time, half the steps 0.60 of it, each timed once.")
    other = dataclasses.replace(fast, name="overflowing")
    lost = [Row(other, rows_timed[2].metrics, broken=3), Row(fast, ({**measured(0, 0, 0), "value": None},))]
    broken = conclusion(SimpleNamespace(rows=[*rows, *lost], settings={"num_images": 64}))
    assert "; overflowing: not usable, error not finite; fast: not usable, error not finite; no times" in broken
    assert "overflowing (" not in broken
    assert told.endswith("integers were simulated in floats here, so nothing was faster than full precision.")


def test_tables_sort_by_value_or_as_a_reader_would_and_mark_one_column(page: Browser) -> None:
    page.run(PRESS % 1)
    assert names(page) == ["b10", "c", "b2", "a"]  # what was not measured stays last
    assert page.run(SORTED) == [None, "ascending", None]
    page.run(PRESS % 1)
    assert names(page) == ["b2", "c", "b10", "a"]
    assert page.run(SORTED) == [None, "descending", None]
    page.run(PRESS % 0)
    assert names(page) == ["a", "b2", "b10", "c"]
    assert page.run(SORTED) == ["ascending", None, None]
    page.run("document.querySelectorAll('#numbers button')[1].focus();")
    for kind in ("keyDown", "keyUp"):
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        page.command("Input.dispatchKeyEvent", type=kind, **key)
    assert names(page) == ["b10", "c", "b2", "a"]


def test_the_page_may_load_nothing_and_run_no_other_script(page: Browser) -> None:
    page.run("""const script = document.createElement("script"); script.textContent = "document.title = 'run'";
document.body.append(script);
const image = document.createElement("img"); image.src = "http://127.0.0.1:9/x.png"; document.body.append(image);""")
    assert page.run("return document.title") == "Title plain"
    refused = page.console()
    assert len([line for line in refused if "Content Security Policy" in line]) == 2, refused


def test_dark_mode_turns_ink_and_paper_round_print_is_black_on_white_and_narrow_screens_fit(page: Browser) -> None:
    def colours(media: str, scheme: str) -> list[str]:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.command("Emulation.setEmulatedMedia", media=media, features=features)
        return page.run(COLOURS)

    light, dark, printed = colours("screen", "light"), colours("screen", "dark"), colours("print", "dark")
    page.command("Emulation.setEmulatedMedia", media="", features=[])
    assert light == ["rgb(27, 31, 36)", "rgb(255, 255, 255)"]
    assert dark == ["rgb(230, 233, 237)", "rgb(20, 23, 27)"]
    assert printed == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    page.command("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=True)
    width = page.run("return document.documentElement.scrollWidth")
    page.command("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    assert width <= 360
