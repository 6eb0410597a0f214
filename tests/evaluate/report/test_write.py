"""The folder of a report: two files and the figures, each whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from modiff.evaluate.report import write as module
from modiff.evaluate.report.markdown import markdown
from modiff.evaluate.report.page import html_page
from modiff.evaluate.report.write import write_report
from tests.evaluate.report.documents import document, png


def test_it_writes_page_text_and_figures(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    page, text = write_report(document(), folder)
    assert (page.name, text.name) == ("report.html", "report.md")
    assert page.read_text(encoding="utf-8") == html_page(document())
    assert text.read_text(encoding="utf-8") == markdown(document(), "figures")
    assert (folder / "figures" / "dots.png").read_bytes() == png()
    assert sorted(p.name for p in folder.rglob("*")) == ["dots.png", "figures", "lines.svg", "report.html", "report.md"]


def test_a_full_disk_names_the_file_and_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(document(), tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def full(path: Path, write: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(OSError, match=r"dots\.png"):
        write_report(document("other"), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
