"""Documents: what is read of every kind of file, and what is said about a file that cannot be read."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pypdf
import pytest
from support.pdfs import pdf

from kvcompose_gguf.errors import ConfigError
from kvcompose_gguf.support.documents import Document, join_documents, read_document, read_documents


def write(folder: Path, name: str, data: bytes | str) -> str:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def encrypted(path: Path, user_password: str) -> str:
    writer = pypdf.PdfWriter(clone_from=pdf(path, "the vault opens at noon"))
    writer.encrypt(user_password, "owner", algorithm="RC4-128")
    writer.write(str(path))
    return str(path)


#
# what is read
#


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "noname"])
def test_text_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    source = write(tmp_path, name, "# One\n\ndef two():\n    return 'drei äöü'\n")
    assert read_document(source) == Document(source, "# One\n\ndef two():\n    return 'drei äöü'", "text")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_a_text_is_encoded(tmp_path: Path, encoding: str) -> None:
    source = write(tmp_path, "a.txt", "Grüße an 世界\n".encode(encoding))
    assert read_document(source).text == "Grüße an 世界"


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_lines_end_alike_on_every_system(tmp_path: Path, end: str) -> None:
    assert read_document(write(tmp_path, "a.txt", f"one{end}two{end}")).text == "one\ntwo"


PAGE = """<!DOCTYPE html><html><head><meta charset="{charset}"><title>The r\u00e9port</title>
<style>p {{ color: red }}</style><script>alert("no")</script></head>
<body><h1>Heading</h1><p>A <a href="https://example.org/long/address">link</a> and <b>bold</b> caf\u00e9.</p>
<ul><li>one</li><li>two</li></ul><table><tr><th>name</th><th>price</th></tr><tr><td>tea</td><td>3</td></tr></table>
<noscript>enable scripts</noscript></body></html>"""


@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1"])
def test_html_becomes_markdown_without_scripts_and_addresses(tmp_path: Path, charset: str) -> None:
    document = read_document(write(tmp_path, "a.html", PAGE.format(charset=charset).encode(charset)))
    assert document.kind == "html"
    assert document.text.startswith("The réport\n\n# Heading\n\nA link and **bold** café.\n\n- one\n- two")
    assert "| tea | 3 |" in document.text
    for hidden in ("color", "alert", "example.org", "enable scripts"):
        assert hidden not in document.text


def test_html_is_known_by_its_beginning_too(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "page", "\n<!doctype HTML><p>hello <i>there</i>"))
    assert (document.kind, document.text) == ("html", "hello *there*")


def test_a_pdf_is_all_its_pages(tmp_path: Path) -> None:
    source = pdf(tmp_path / "a.pdf", "The first page.", "", "The third page.")
    assert read_document(source) == Document(source, "The first page.\n\nThe third page.", "pdf")


def test_a_pdf_is_known_by_its_beginning_whatever_its_name(tmp_path: Path) -> None:
    pdf(tmp_path / "a.pdf", "Hidden in a text file.")
    assert read_document(write(tmp_path, "a.txt", (tmp_path / "a.pdf").read_bytes())).kind == "pdf"


def test_a_pdf_that_opens_without_a_password_is_read(tmp_path: Path) -> None:
    assert read_document(encrypted(tmp_path / "a.pdf", "")).text == "the vault opens at noon"


def test_standard_input_is_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped \xc3\xa4\n")))
    assert read_documents(["-"]) == [Document("standard input", "piped ä", "text")]


def test_standard_input_may_be_a_pdf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(pdf(tmp_path / "a.pdf", "Piped pages.")).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_document("-") == Document("standard input", "Piped pages.", "pdf")


def test_every_document_has_a_heading_in_the_joined_text() -> None:
    joined = join_documents([Document("a.txt", "one", "text"), Document("b\n\x1b[31m.md", "two", "text")])
    assert joined == "Document a.txt:\n\none\n\nDocument b [31m.md:\n\ntwo"


#
# what cannot be read
#


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.bin", bytes(range(256)), "is a binary file, not text. Documents are text, Markdown"),
        ("late.txt", b"text " * 4000 + b"\0\1\2", "is a binary file, not text. Documents are text, Markdown"),
        ("page.html", b"<html><p>a\0b", "is a binary file, not text. Documents are text, Markdown"),
        ("m.gguf", b"GGUF\3\0\0\0", "is a model: models come before the documents"),
        ("a.txt", b"", "is empty: give a document"),
        ("spaces.txt", b" \n\t\n", "is empty: give a document"),
        ("a.html", b"<html><head><title></title></head><body><script>x()</script></body></html>", "has no text, only"),
        ("latin.txt", "na\u00efve caf\u00e9".encode("latin-1"), "is not UTF-8 text (byte 2): save it as UTF-8"),
        ("cut.txt", "ab".encode("utf-16") + b"c", "is not UTF-16 text (byte 6)"),
        ("broken.pdf", b"%PDF-1.7\nnothing of the kind", "is a damaged PDF"),
    ],
)  # fmt: skip
def test_a_file_without_text_is_named_with_what_to_do(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    source = write(tmp_path, name, data)
    with pytest.raises(ConfigError) as error:
        read_document(source)
    assert str(error.value).startswith(f"{source} {says}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^/\S+nowhere\.txt does not exist: check the name"):
        read_document(str(tmp_path / "nowhere.txt"))


def test_a_folder_is_no_document(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^/\S+ is a folder: name the files in it"):
        read_document(str(tmp_path))


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: str) -> None:  # root may read every file, so that a mode would refuse nothing
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    source = write(tmp_path, "secret.txt", "x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"secret\.txt cannot be read: Permission denied"):
        read_document(source)


@pytest.mark.parametrize("source", ["a\0b", "~nobody-of-this-name/a.txt"])
def test_a_name_that_is_no_path_is_an_error_of_ours(source: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_document(source)


def test_a_pdf_with_a_password_says_how_to_remove_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.pdf is encrypted with a password: save a copy .*qpdf"):
        read_document(encrypted(tmp_path / "a.pdf", "sesame"))


def test_a_pdf_whose_cipher_is_not_installed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: pypdf.PdfReader, password: str) -> None:
        raise pypdf.errors.DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(pypdf.PdfReader, "decrypt", refuse)
    with pytest.raises(ConfigError, match=r"is encrypted: save a copy .*pypdf\[crypto\]"):
        read_document(encrypted(tmp_path / "a.pdf", ""))


def test_a_scanned_pdf_says_how_to_make_text_of_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 2 pages and no text, it is probably a scan: .*ocrmypdf"):
        read_document(pdf(tmp_path / "a.pdf", "", ""))


def test_warnings_about_a_pdfs_insides_are_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    data = Path(pdf(tmp_path / "a.pdf", "Readable all the same.")).read_bytes()
    assert read_document(write(tmp_path, "b.pdf", b"junk before\n" + data)).text == "Readable all the same."
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_a_terminal_as_standard_input_is_no_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(ConfigError, match="standard input is a terminal: pipe a document in"):
        read_document("-")


def test_standard_input_is_read_once() -> None:
    with pytest.raises(ConfigError, match="'-' is given twice"):
        read_documents(["-", "a.txt", "-"])
