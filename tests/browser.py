"""A real browser for tests: headless Chromium by the W3C WebDriver protocol, spoken with the standard library alone."""

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WAIT = 60
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
"""Chromium itself asks the network for nothing, so that every request seen is the page's."""


class Browser:
    def __init__(self, driver: str, browser: str) -> None:
        self.driver = driver
        # no-sandbox: tests run as root in containers; dev-shm: their /dev/shm is small
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", *QUIET],
                   "binary": browser}  # fmt: skip
        logs = {"browser": "ALL", "performance": "ALL"}
        chrome = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        window = self._call("POST", "/session", {"capabilities": {"alwaysMatch": chrome}})
        self.window = f"/session/{window['sessionId']}"

    def open(self, page: Path | str) -> None:
        """A file, or an address."""
        url = page.resolve().as_uri() if isinstance(page, Path) else page
        self._call("POST", f"{self.window}/url", {"url": url})

    def new_tab(self) -> str:
        """The handle of a new tab; `switch` goes to it."""
        return self._call("POST", f"{self.window}/window/new", {"type": "tab"})["handle"]

    def tab(self) -> str:
        return self._call("GET", f"{self.window}/window")

    def switch(self, tab: str) -> None:
        self._call("POST", f"{self.window}/window", {"handle": tab})

    def close_tab(self) -> None:
        self._call("DELETE", f"{self.window}/window")

    def until(self, condition: str, seconds: float = 30) -> Any:
        """Wait until a JavaScript expression is true, and give its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < end, f"{condition}: not within {seconds} s"
            time.sleep(0.1)
        return value

    def run(self, script: str) -> Any:
        """The value that a JavaScript function body returns; a promise is waited for."""
        return self._call("POST", f"{self.window}/execute/sync", {"script": script, "args": []})

    def command(self, name: str, **parameters: Any) -> Any:
        return self._call("POST", f"{self.window}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def console(self) -> list[str]:
        """What was logged since the last call: errors, warnings, refused requests."""
        return [entry["message"] for entry in self._call("POST", f"{self.window}/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call, data of the page itself left out."""
        entries = self._call("POST", f"{self.window}/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [call["request"]["url"] for call in sent]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def close(self) -> None:
        self._call("DELETE", self.window)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.driver + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            return json.loads(answer.read())["value"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; the test is skipped where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver on the PATH: apt-get install chromium chromium-driver")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        window = Browser(f"http://localhost:{_port(process)}", browser)
        try:
            yield window
        finally:
            window.close()
    finally:
        process.terminate()
        process.wait(WAIT)
        if process.stdout:
            process.stdout.close()


def keep_screenshot(browser: Browser, name: str) -> None:
    """The whole page as a PNG file, where the environment names a folder."""
    if folder := os.environ.get("MODIFF_SCREENSHOTS"):
        shown = browser.command("Page.captureScreenshot", captureBeyondViewport=True)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(shown["data"]))


def _port(process: subprocess.Popen[str]) -> int:
    """The port that the driver chose and printed."""
    for line in process.stdout or ():
        head, _, tail = line.rpartition("on port ")
        if head.startswith("ChromeDriver was started successfully"):
            return int(tail.strip().rstrip("."))
    raise RuntimeError("chromedriver: expected a port, got none before it ended. Run it by hand to see why.")
