"""How Sphinx makes the site of this folder: `make docs`. Nothing is fetched, and no page asks for anything remote."""

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))  # the tree of this page, not an installed one

project, author, copyright = "modiff", "the modiff authors", "the modiff authors, Apache-2.0"
version = release = version_of("modiff")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "results"]

html_theme = "furo"
html_title = "modiff"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_sourcelink = False
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # links such as extending.md#predictor
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

nitpick_ignore_regex = [  # names of others, whose sites are not asked, and names inside of the package
    (r"py:.*", r"(torch|diffusers|transformers|PIL|numpy|collections|contextlib|os|pathlib|typing)\..*"),
    (r"py:.*", r"(tuple|dict)\[.*|Tensor"),
    (r"py:.*", r"modiff\.(core|kernels|nn)\..*"),
]
highlight_language = "none"  # of blocks that name no language
default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88

SECTION = re.compile(r"(Args|Returns|Raises|Cost):\s*(.*)")
ENTRY = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): (.*)")
"""`name: text`, or several names of one text: an argument, or a field of a class."""


def escaped(text: str) -> str:
    """The text with its stars and bars as characters; code between backticks is left alone."""
    return "".join(
        part if part.startswith("`") else re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", part)
        for part in re.split(r"(`[^`]*`)", text)
    )


def entry(line: str) -> str | None:
    """The line as the field of a list, if one begins there."""
    if match := SECTION.fullmatch(line):
        section, text = match.groups()
        return (entry(text) if text else "") if section == "Args" else f":{section}: {escaped(text)}"
    if match := ENTRY.fullmatch(line):
        return f":param {match[1].replace(', ', ',')}: {escaped(match[2])}"
    return None


def as_fields(lines: list[str]) -> list[str]:
    """A docstring of this package as reStructuredText: arguments and fields in lists, indented blocks as they stand."""
    out: list[str] = []
    kind = "text"  # of the line before: text, field, code or example
    for line, before in zip(lines, ["", *lines], strict=False):
        indented, bare = line.startswith("    "), line.strip()
        field = None if not bare or (kind == "code" and indented) else entry(bare if kind == "field" else line)
        if not bare:
            kind = kind if kind == "code" else "text"
            out.append("")
        elif field is not None and (kind == "field" or not before or SECTION.match(line)):
            out += [*([""] if kind != "field" and out and out[-1] else []), *([field] if field else [])]
            kind = "field"
        elif kind == "field":
            out.append(f"    {escaped(bare)}")
        elif indented and kind in ("text", "code") and (kind == "code" or not before):
            out += [*(["::", ""] if kind == "text" else []), line]
            kind = "code"
        else:
            kind = "example" if bare.startswith(">>>") or kind == "example" else "text"
            out.append(line if kind == "example" else escaped(line))
    return out


def setup(app: Sphinx) -> None:
    """Docstrings are read as this package writes them."""
    app.connect("autodoc-process-docstring", lambda app, what, name, thing, options, lines: rewrite(lines))


def rewrite(lines: list[str]) -> None:
    """`as_fields`, in place, as Sphinx asks for it."""
    lines[:] = as_fields(lines)
