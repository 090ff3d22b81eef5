"""PDF files for the tests."""

from __future__ import annotations

from pathlib import Path

import fpdf


def pdf(path: Path, *pages: str) -> str:
    """A PDF with a page a text; an empty text leaves its page without one."""
    out = fpdf.FPDF()
    for text in pages:
        out.add_page()
        out.set_font("helvetica", size=12)
        if text:
            out.multi_cell(0, text=text)
        else:
            out.rect(10, 10, 50, 50)  # a drawing, as a scan is
    out.output(str(path))
    return str(path)
