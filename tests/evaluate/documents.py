"""A document with everything a report can hold, and texts that would break out of it if they could."""

from __future__ import annotations

import io

from PIL import Image

from modiff.evaluate.report.document import Cell, Column, Document, Figure, Section, Table, Verbatim

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
