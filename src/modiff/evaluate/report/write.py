"""Put a report into a folder."""

from __future__ import annotations

from pathlib import Path

from modiff.evaluate.report.document import Document
from modiff.evaluate.report.markdown import file_name, markdown
from modiff.evaluate.report.page import html_page
from modiff.files import check_writable, write_atomically

PAGE, TEXT, FIGURES = "report.html", "report.md", "figures"


def write_report(document: Document, folder: Path) -> list[Path]:
    """Write report.html, which needs no other file, and report.md with its figures in figures/.

    Returns: the two.
    Raises: OSError that names the file, if one cannot be written. Each file is whole or the old one.
    """
    for figure in document.figures():
        path = folder / FIGURES / file_name(figure)
        check_writable(path)
        write_atomically(path, lambda file, data=figure.data: file.write(data))
    written: list[Path] = []
    for name, text in ((TEXT, markdown(document, FIGURES)), (PAGE, html_page(document))):
        path = folder / name
        check_writable(path)
        write_atomically(path, lambda file, text=text: file.write(text.encode()))
        written.append(path)
    return written[::-1]
