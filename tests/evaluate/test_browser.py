"""The report in a real browser: nothing goes wrong, everything is there to be seen, tables sort, texts stay texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from modiff.evaluate.features.classifier import Classifier, ClassifierFeatures
from modiff.evaluate.pipelines import PipelineSource
from modiff.evaluate.report.page import write_report
from modiff.evaluate.report.sections import suite_document
from modiff.evaluate.suite.plans import Preset
from modiff.evaluate.suite.run import run_suite, watched_layers
from tests.browser import Browser, chromium, keep_screenshot
from tests.evaluate.documents import NASTY, document
from tests.pixels import pixel_pipeline

IMAGES = """return [...document.images].map((image) => {
  const box = image.getBoundingClientRect();
  return {id: image.closest("figure").id, natural: image.naturalWidth, width: box.width, height: box.height,
          right: box.right, alt: image.alt};
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
    extractor = ClassifierFeatures(Classifier(channels=(4, 8), classes=3), "tiny")
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
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    keep_screenshot(browser, "report-dark")
    browser.command("Emulation.setEmulatedMedia", features=[])
    assert browser.console() == []


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


def test_texts_that_try_to_break_out_are_shown_and_run_nothing(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_report(document(NASTY), tmp_path)[0])
    assert browser.run("return document.title") == f"Title {NASTY}"
    assert names(browser, "texts") == [NASTY]
    assert browser.run("return document.images.length") == 2
    assert browser.console() == []


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
