"""The text of documents: plain text, Markdown, code, HTML, PDF and standard input."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from ..errors import ConfigError
from .loggers import silenced

if TYPE_CHECKING:
    import pypdf

Kind = Literal["text", "html", "pdf"]  # Markdown and code are text

_STDIN = "standard input"
_BLOCK = 8192  # bytes that decide whether a file is text
#: byte order marks, the longer ones first: UTF-32's begins with UTF-16's
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_HTML_SUFFIXES = (".html", ".htm", ".xhtml")
#: elements of a page that nobody reads
_UNSEEN = ("script", "style", "noscript", "template", "svg", "head")


@dataclass(frozen=True)
class Document:
    """A text and where it comes from; ``name`` is what the user called it."""

    name: str
    text: str
    kind: Kind


def read_document(source: str) -> Document:
    """The text of a file, or of standard input if ``source`` is ``-``.

    Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. HTML becomes Markdown without links.

    Raises:
        ConfigError: there is no such file, or it has no text that can be read.
    """
    name = _STDIN if source == "-" else source
    return document_of(name, _bytes_of(source, name))


def document_of(name: str, data: bytes) -> Document:
    """The text of a file's bytes, which are read as ``read_document`` does it.

    Raises:
        ConfigError: they have no text that can be read.
    """
    if not data.strip():
        raise ConfigError(f"{name} is empty: give a document that has text")
    kind = _kind(name, data)
    if kind == "pdf":
        text = _pdf_text(name, data)
    elif kind == "html":
        _refuse_binary(name, data)
        text = _html_text(data)
    else:
        text = _plain_text(name, data)
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise ConfigError(f"{name} has no text, only spaces or markup: give a document that has text")
    return Document(name, text, kind)


def read_documents(sources: Sequence[str]) -> list[Document]:
    """All documents of a command line, in order.

    Raises:
        ConfigError: one of them cannot be read, or standard input is named twice.
    """
    if list(sources).count("-") > 1:
        raise ConfigError("files: '-' is given twice, but standard input can be read only once")
    return [read_document(source) for source in sources]


def join_documents(documents: Sequence[Document]) -> str:
    """One text of all documents, each below a line with its name."""
    return "\n\n".join(f"Document {_one_line(document.name)}:\n\n{document.text}" for document in documents)


def _one_line(name: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())


def _bytes_of(source: str, name: str) -> bytes:
    if source == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError(
                "file '-' is standard input, and standard input is a terminal: pipe a document in, "
                "e.g. `cat notes.txt | kvcompose chat MODEL -`"
            )
        return _read(name, sys.stdin.buffer)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise ConfigError(f"{name} is a folder: name the files in it, e.g. {path / '*.md'}")
        with path.open("rb") as stream:
            return _read(name, stream)
    except ConfigError:  # a ValueError too
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{name} does not exist: check the name and the folder") from error
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name; ~nobody has no home
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{name} cannot be read: {reason}") from error


def _read(name: str, stream: BinaryIO) -> bytes:
    """All bytes of a stream, which is read to its end only if it begins like a document."""
    first = stream.read(_BLOCK)
    if not _is_pdf(first):
        _refuse_binary(name, first)
    return first + stream.read()


def _refuse_binary(name: str, data: bytes) -> None:
    if b"\0" in data and not _mark(data):
        what = "a model: models come before the documents" if data.startswith(b"GGUF") else "a binary file, not text"
        raise ConfigError(f"{name} is {what}. Documents are text, Markdown, code, HTML or PDF: convert it first")


def _kind(name: str, data: bytes) -> Kind:
    if _is_pdf(data):
        return "pdf"
    if Path(name).suffix.lower() in _HTML_SUFFIXES:
        return "html"
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return "html" if start.startswith((b"<!doctype html", b"<html")) else "text"


def _is_pdf(data: bytes) -> bool:
    return b"%PDF-" in data[:1024]  # readers accept the mark anywhere in there


#
# text
#


def _mark(data: bytes) -> str | None:
    """The encoding that a byte order mark names."""
    return next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), None)


def _plain_text(name: str, data: bytes) -> str:
    _refuse_binary(name, data)
    encoding = _mark(data) or "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not {encoding.removesuffix('-sig').upper()} text (byte {error.start}): save it as UTF-8, "
            "e.g. `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`"
        ) from error


def _html_text(data: bytes) -> str:
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    soup = BeautifulSoup(data, "html.parser")
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    for element in soup(_UNSEEN):
        element.decompose()
    # links and images are addresses, which cost tokens and say little
    body = MarkdownConverter(heading_style="atx", bullets="-", strip=["a", "img"]).convert_soup(soup).strip()
    lines = (line.rstrip() for line in body.splitlines())
    text = _without_gaps(lines)
    return f"{title}\n\n{text}" if title and title not in text[: len(title) + 8] else text


def _without_gaps(lines: Iterator[str]) -> str:
    """The lines with at most one empty line between two others."""
    out: list[str] = []
    for line in lines:
        if line or (out and out[-1]):
            out.append(line)
    return "\n".join(out)


#
# PDF
#


def _pdf_text(name: str, data: bytes) -> str:
    import pypdf

    try:
        with silenced("pypdf"):
            reader = pypdf.PdfReader(io.BytesIO(data))
            _decrypt(name, reader)
            pages = [page.extract_text() for page in reader.pages]
    except ConfigError:
        raise
    except Exception as error:  # a damaged file raises whatever the parser stumbles over
        raise ConfigError(f"{name} is a damaged PDF ({error}): open it in a viewer and save it again") from error
    text = "\n\n".join(page.strip() for page in pages if page.strip())
    if not text:
        raise ConfigError(
            f"{name} has {len(pages)} pages and no text, it is probably a scan: make its text searchable first, "
            "e.g. with `ocrmypdf SCAN.pdf TEXT.pdf`"
        )
    return text


def _decrypt(name: str, reader: pypdf.PdfReader) -> None:
    """Open a PDF that needs no password, as viewers do."""
    from pypdf.errors import DependencyError

    if not reader.is_encrypted:
        return
    advice = "save a copy without encryption, e.g. with `qpdf --password=... --decrypt LOCKED.pdf OPEN.pdf`"
    try:
        opened = reader.decrypt("")
    except DependencyError as error:
        raise ConfigError(f"{name} is encrypted: {advice}, or `pip install 'pypdf[crypto]'`") from error
    if not opened:
        raise ConfigError(f"{name} is encrypted with a password: {advice}")
