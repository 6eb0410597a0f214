"""The site: it builds without a warning, every page is reached from the index, and nothing of it is remote."""

import doctest
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import modiff
from tests.browser import Browser, chromium, keep_screenshot
from tests.docs.pages import blocks, imported

sphinx = pytest.importorskip("sphinx")
for extension in ("furo", "myst_parser", "sphinx_copybutton", "sphinx_design"):
    pytest.importorskip(extension)
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md"))
REMOTE = re.compile(r"^(?:[a-z]+:)?//", re.IGNORECASE)
LOADING = {
    "link": "href",
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "audio": "src",
    "video": "src",
}


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in LOADING and LOADING[tag] in values and values.get("rel") != "canonical":
            self.loads.append(values[LOADING[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-E",
        "-W",
        "--keep-going",
        "-n",
        "-q",
        "-b",
        "html",
        DOCS,
        folder / "html",
    ]
    done = subprocess.run([*command, "-d", folder / "trees"], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}


def links_inside(name: str, page: Page) -> Iterator[tuple[str, str]]:
    """The links of a page that stay on the site: (page or file, anchor)."""
    for link in page.links:
        address, anchor = urldefrag(unquote(link))
        if not REMOTE.match(link) and not link.startswith(("mailto:", "javascript:")):
            target = (Path("/") / Path(name).parent / address).resolve() if address else Path("/") / name
            yield target.relative_to("/").as_posix(), anchor


def test_every_page_is_reached_from_the_index(pages: dict[str, Page]) -> None:
    """By the links of the navigation and of the text, from page to page."""
    seen, todo = set(), ["index.html"]
    while todo:
        name = todo.pop()
        seen.add(name)
        todo += [target for target, _ in links_inside(name, pages[name]) if target in pages and target not in seen]
    assert [page for page in PAGES if f"{page}.html" not in seen] == []


def test_every_link_of_the_site_has_a_page_or_a_file_and_its_anchor(pages: dict[str, Page], site: Path) -> None:
    broken = []
    written = {name: page for name, page in pages.items() if not name.startswith("_modules/")}  # viewcode's way back
    for name, page in written.items():
        for target, anchor in links_inside(name, page):
            missing = anchor and target in pages and anchor not in pages[target].anchors
            if missing or not (site / target).exists():
                broken.append(f"{name}: {target}#{anchor}")
    assert broken == []


def test_no_page_and_no_style_loads_anything_remote_and_every_image_is_there(
    pages: dict[str, Page], site: Path
) -> None:
    assert [
        f"{name}: {address}" for name, page in pages.items() for address in page.loads if REMOTE.match(address)
    ] == []
    files = {name: [urldefrag(a)[0].partition("?")[0] for a in page.loads] for name, page in pages.items()}
    absent = [
        f"{name}: {a}" for name, all_ in files.items() for a in all_ if not (site / name).parent.joinpath(a).exists()
    ]
    assert [address for address in absent if ": data:" not in address] == []
    styles = {path.name: path.read_text(encoding="utf-8") for path in site.rglob("*.css")}
    fetched = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", re.IGNORECASE)
    assert [name for name, text in styles.items() if fetched.search(text)] == []


def test_every_public_name_is_in_the_reference(pages: dict[str, Page]) -> None:
    anchors = {anchor for name, page in pages.items() if name.startswith("reference/") for anchor in page.anchors}
    names = [name for name in modiff.__all__ if not name.startswith("__") and name != "presets"]
    assert [name for name in names if f"modiff.{name}" not in anchors] == []
    assert "modiff.presets.modulated" in anchors
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *DOCS.rglob("*.md"))]
    told = {name for text in texts for name in imported(blocks(text, "python", "py"))}
    told |= {name for path in (ROOT / "examples").glob("*.py") for name in imported([path.read_text(encoding="utf-8")])}
    short = {anchor.rpartition(".")[2] for anchor in anchors}
    assert {name for name in told if name not in anchors and name.rpartition(".")[2] not in short} == set()


def test_what_reads_the_pages_sees_what_is_wrong(site: Path) -> None:
    page = Page('<img src="https://a/b.png"><a href="../x.html#y">x</a><a href="//z">z</a><p id="here">')
    assert [REMOTE.match(address) is not None for address in page.loads] == [True]
    assert list(links_inside("a/b.html", page)) == [("x.html", "y")]
    assert page.anchors == {"here"}


DOCSTRING = """One sentence with *, |x| and x_.

    a_t = b * c

bits: 2 to 8, or None
    and more.
gain, ratio: of a move.
Args:
    x: (*, features), `a*b`.
Returns: what comes out.

>>> 1 * 1
1
"""
FIELDS = r"""One sentence with \*, \|x\| and x\_.

::

    a_t = b * c

:param bits: 2 to 8, or None
    and more.
:param gain,ratio: of a move.
:param x: (\*, features), `a*b`.
:Returns: what comes out.

>>> 1 * 1
1
"""


def test_a_docstring_becomes_lists_and_blocks() -> None:
    conf = runpy.run_path(str(DOCS / "conf.py"))
    assert "\n".join(conf["as_fields"](DOCSTRING.splitlines())) + "\n" == FIELDS
    assert conf["as_fields"](["A sentence that ends in", "words: like these."]) == [
        "A sentence that ends in",
        "words: like these.",
    ]
    assert doctest.DocTestParser().get_examples(FIELDS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as window:
        yield window


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["index", "should-i-use-it", "benchmarks", "reference/verbs"])
def test_a_page_fits_a_desk_and_a_phone_and_the_browser_has_nothing_to_say(
    name: str, width: int, scheme: str, site: Path, browser: Browser
) -> None:
    """Wide tables and code scroll inside of their boxes; text keeps its contrast when the reader's screen is dark."""
    browser.command(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
    )
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(site / f"{name}.html")
    keep_screenshot(browser, f"docs-{name.replace('/', '-')}-{width}-{scheme}")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.console() == []
    colors = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
    text, ground = (sum(map(int, re.findall(r"\d+", color)[:3])) / 3 for color in browser.run(colors))
    assert (text - ground > 100) if scheme == "dark" else (ground - text > 100)
