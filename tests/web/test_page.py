"""The page in a real browser: load, generate, compare, stop, refuse, two tabs, a phone; and what the server lets out.

With MODIFF_SCREENSHOTS=DIR the pictures of these tests are kept there; docs/figures/ui.png is the one called "ui":

    MODIFF_SCREENSHOTS=docs/figures python -m pytest tests/web/test_page.py -k side_by_side
"""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.browser import Browser, chromium, keep_screenshot
from tests.hosts.tiny import HOSTS
from tests.pixels import saved_pipeline

if find_spec("gradio") is None:  # not imported here: that takes two seconds in each process of the suite
    pytest.skip("needs modiff[web]", allow_module_level=True)
STATUS = "document.querySelector('#m-status')?.innerText"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `modiff ui`, which must end at Ctrl-C with one line."""
    root = tmp_path_factory.mktemp("root")
    saved_pipeline(root / "tiny")
    HOSTS["sd"].build().save_pretrained(root / "draws" / "sd")
    (root / "empty").mkdir()
    (root / "broken").mkdir()
    (root / "broken/model_index.json").write_text("{")
    command = [sys.executable, "-m", "modiff", "ui", "--root", str(root), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[2]
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
            assert (process.returncode, errors) == (130, "modiff: interrupted. Files that were finished are kept.\n")
        finally:
            process.kill()


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def browser(window: Browser, server: str) -> Iterator[Browser]:
    """At a page that is loaded; afterwards nothing was logged, and no other host was asked for anything."""
    window.console(), window.requests()
    size(window, 1280, 900)
    open_page(window, server)
    yield window
    assert [line for line in window.console() if "favicon" not in line] == []
    assert [url for url in window.requests() if not url.startswith(server)] == []


def open_page(browser: Browser, server: str) -> None:
    browser.open(server)
    browser.until("document.querySelector('#m-facts')?.innerText.includes('DDIMPipeline')")


def size(browser: Browser, width: int, height: int, *, mobile: bool = False) -> None:
    scale = 2 if mobile else 1
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
    browser.command("Emulation.setDeviceMetricsOverride", **metrics)


def click(browser: Browser, selector: str) -> None:
    browser.run(f"document.querySelector('{selector}').click()")


def type_into(browser: Browser, selector: str, text: str) -> None:
    """As a person does: the field is focused, emptied and typed into, and Enter is pressed."""
    browser.run(f"const field = document.querySelector('{selector}'); field.focus(); field.select?.()")
    browser.command("Input.insertText", text=text)
    for kind in ("keyDown", "keyUp"):
        browser.command("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
    browser.run("document.activeElement.blur()")


def steps(browser: Browser, count: int) -> None:
    type_into(browser, "#m-steps input[type=number]", str(count))


def until_status(browser: Browser, text: str) -> str:
    return browser.until(f"{STATUS}?.includes('{text}') && {STATUS}")


def generate(browser: Browser, count: int) -> None:
    steps(browser, count)
    click(browser, "#m-generate")
    until_status(browser, "done")


def status(request: str | urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def images(browser: Browser) -> int:
    return browser.run("return document.querySelectorAll('#m-pictures img').length")


def test_both_are_shown_as_they_denoise_and_then_side_by_side(browser: Browser) -> None:
    steps(browser, 30)
    click(browser, "#m-generate")
    browser.until("document.querySelectorAll('#m-pictures img').length == 4")  # full precision alone
    assert browser.run("return document.querySelector('#m-status progress').max") == 30
    browser.until("document.querySelectorAll('#m-pictures img').length == 12")
    until_status(browser, "done")
    assert "The images differ by" in browser.until("document.querySelector('.m-conclusion')?.innerText")
    assert browser.run("return document.querySelectorAll('#m-summary tbody tr').length") == 4
    assert "difference ×8" in browser.run("return document.querySelector('#m-pictures').innerText")
    assert browser.run("return document.querySelector('#m-pictures img').getBoundingClientRect().width") >= 96
    time.sleep(0.3)  # buttons fade
    keep_screenshot(browser, "ui")


def test_layers_heat_map_and_files_come_with_the_result(browser: Browser, tmp_path: Path) -> None:
    generate(browser, 4)
    for box in ("layers", "heat"):
        click(browser, f"#m-{box}-box button")
    assert browser.until("document.querySelectorAll('#m-layers tbody tr').length") > 40
    click(browser, "#m-look")
    browser.until("document.querySelector('#m-heat img')?.naturalWidth > 100")
    until_status(browser, "done")
    browser.command("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    report, config = (tmp_path / name for name in ("modiff-report.html", "modiff-config.json"))
    for button, path in (("#m-report", report), ("#m-config", config)):
        click(browser, button)
        end = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
    assert "Where the error arises" in report.read_text(encoding="utf-8")
    assert json.loads(config.read_text())["layer"]["activation"]["bits"] == 4


def test_a_stop_in_the_middle_leaves_nothing_broken(browser: Browser) -> None:
    steps(browser, 250)
    click(browser, "#m-generate")
    browser.until("document.querySelector('#m-status progress')?.value > 2")
    click(browser, "#m-stop")
    until_status(browser, "stopped")
    assert browser.run("return document.querySelector('#m-stop').disabled")
    generate(browser, 3)
    assert images(browser) == 12


def test_a_wrong_folder_or_field_is_one_line_and_the_last_result_stays(browser: Browser) -> None:
    generate(browser, 2)
    configuration, seed = "#m-configuration input", "#m-seed input"
    for field, typed, words in (
        (configuration, "w9a9", "w9a9"),
        (configuration, "w8a4", "done"),
        (seed, "-3", "got -3"),
        (seed, "", "got -1"),
        ("#m-model input", "../outside", "inside the folder"),
        ("#m-model input", "empty", "folder of a diffusers pipeline"),
        ("#m-model input", "/etc", "inside the folder"),
        ("#m-model input", "broken", "model_index.json"),
        ("#m-model input", "<img src=x onerror=alert(1)>", "no such folder"),
    ):
        type_into(browser, field, typed)
        if field == "#m-model input":
            browser.until(f"document.querySelector('#m-facts .m-error')?.innerText.includes('{words}')")
            type_into(browser, seed, "0")
        click(browser, "#m-generate")
        assert "\n" not in until_status(browser, words).strip()
        assert images(browser) == 12


def test_a_model_that_takes_a_prompt_asks_for_it(browser: Browser) -> None:
    assert browser.run("return document.querySelector('#m-prompt')?.offsetHeight ?? 0") == 0
    type_into(browser, "#m-model input", "draws/sd")
    browser.until("document.querySelector('#m-prompt')?.offsetHeight")
    steps(browser, 3)
    click(browser, "#m-generate")
    until_status(browser, "expected `prompt`, got none")
    type_into(browser, "#m-prompt textarea, #m-prompt input", "abc")
    generate(browser, 3)
    assert images(browser) == 12


def test_two_tabs_take_turns_and_a_closed_one_gives_its_turn_away(browser: Browser, server: str) -> None:
    first = browser.tab()
    steps(browser, 250)
    click(browser, "#m-generate")
    browser.until("document.querySelector('#m-status progress')?.value > 0")
    second = browser.new_tab()
    browser.switch(second)
    open_page(browser, server)
    steps(browser, 2)
    click(browser, "#m-generate")
    until_status(browser, "1 request for this model before yours")
    browser.switch(first)
    browser.close_tab()
    browser.switch(second)
    browser.until(f"{STATUS}?.includes('done')", 5)  # the first one alone would take longer


def test_a_phone_scrolls_down_and_never_sideways_in_light_and_in_dark(browser: Browser) -> None:
    size(browser, 390, 844, mobile=True)
    generate(browser, 4)
    for box in ("layers", "heat"):
        click(browser, f"#m-{box}-box button")
    browser.until("document.querySelectorAll('#m-layers tbody tr').length")
    assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    keep_screenshot(browser, "ui-phone")
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    colour = "getComputedStyle(document.querySelector('.m-conclusion')).color.match(/\\d+/g).map(Number)"
    assert min(browser.until(f"Math.min(...{colour}) > 180 && {colour}")) > 180
    keep_screenshot(browser, "ui-dark")
    browser.command("Emulation.setEmulatedMedia", features=[])


@pytest.mark.parametrize(
    "path", ["/gradio_api/file=/etc/passwd", "/gradio_api/file=pyproject.toml", "/file=/etc/passwd"]
)
def test_files_of_the_machine_are_not_served(server: str, path: str) -> None:
    assert status(server + path) in (403, 404)


def test_a_foreign_name_for_this_machine_is_refused_and_the_policy_is_sent(server: str) -> None:
    with urllib.request.urlopen(server, timeout=10) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert status(urllib.request.Request(server, headers={"Host": "evil.example"})) == 400
